"""What the report says of the tuned recipe, on planted runs: turned round, it says the other thing."""

import math

import pandas as pd
import pytest

from ctxlm.analysis import recipe
from ctxlm.analysis.scaling import read_grid
from tests.planted import plant

SIZES = (20_000, 30_000)
NOTHING = tuple(pd.DataFrame() for _ in range(3))


def grid(outputs, name, laws, shapes=None, **options):
    plant(outputs, laws, SIZES, name, shapes=shapes or dict.fromkeys(laws, (6, 128)), **options)
    return read_grid(name)


@pytest.mark.parametrize(("tuned", "verdict"), [(500, "better"), (900, "worse")])
def test_the_recipe_is_set_against_each_of_the_others_in_pairs(outputs, tuned, verdict):
    mine = grid(outputs, "tuned", {"tuned-A": (-0.3, tuned)})
    others = [grid(outputs, "study", {"A": (-0.3, 800)}), grid(outputs, "baselines", {"KN-4": (-0.3, 700)})]
    text = recipe.recipe(mine, others, ["KN-4", "A", "absent"])
    change = f"{100 * (tuned / 700 - 1):+.1f} %".replace("-", "−")
    assert f"tuned-A at 20,000 tokens has a PPL of {tuned}.0, {change} (" in text and f"against KN-4: {verdict}" in text
    assert f"against A: {verdict}; it stands +10.0 % 2 epochs after the best" in text
    assert "20 validation samples drawn again in pairs, single runs, seeds not covered" in text and "absent" not in text
    assert recipe.recipe(NOTHING, others, ["A"]) == ""
    assert "has a PPL of" in recipe.recipe(mine, [NOTHING], ["A"]) and "against A" not in recipe.recipe(
        mine, [NOTHING], ["A"]
    )


def test_what_an_ingredient_is_worth_is_the_change_without_it(outputs):
    mine = grid(outputs, "tuned", {"tuned-A": (-0.3, 500)})
    scale, rate = "tuned-A-without-scale", "tuned-A-without-rate"
    plant(outputs, {scale: (-0.3, 550)}, SIZES, "less", shapes={scale: (6, 128)}, logit_scale=2.0)
    plant(outputs, {rate: (-0.3, 600)}, SIZES, "less", shapes={rate: (6, 128)}, phase2_learning_rate=0.004)
    found = recipe.ingredients(mine, read_grid("less"))
    assert found["experiment"].tolist() == [rate, scale]
    assert [effect.estimate for effect in found["effect"]] == pytest.approx([math.log(1.2), math.log(1.1)])
    assert found["changed"].tolist() == ["phase2_learning_rate = 0.004", "logit_scale = 2.0"] and set(
        found["against"]
    ) == {"tuned-A"}
    table = recipe.ingredients_table(found)
    assert table["Change of PPL"].str.startswith("+20.0 % (").tolist() == [True, False]
    assert table["Pairs"].tolist() == [2, 2]
    assert recipe.ingredients(NOTHING, mine).empty and recipe.ingredients(mine, NOTHING).empty
    assert recipe.ingredients_table(recipe.ingredients(mine, NOTHING)).empty
