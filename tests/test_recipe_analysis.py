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


@pytest.mark.parametrize("tuned", [500, 900])
def test_the_recipe_is_set_against_each_of_the_others_in_pairs(outputs, tuned):
    mine = grid(outputs, "tuned", {"tuned-A": (-0.3, tuned)})
    others = [grid(outputs, "study", {"A": (-0.3, 800)}), grid(outputs, "baselines", {"KN-4": (-0.3, 700)})]
    others[1][0]["model"] = "kneser-ney"
    others[1] = (others[1][0].drop(columns=["best_epoch", "epochs_run"]), *others[1][1:])
    mine[0]["embedding"] = "random"
    found = recipe.beside([mine], others, ["KN-4", "A", "absent"])
    assert list(found)[-2:] == ["Against KN-4", "Against A (ppmi)"] and set(found["Embedding"]) == {"random"}
    for other, ppl in (("KN-4", 700), ("A (ppmi)", 800)):
        change = f"{100 * (tuned / ppl - 1):+.1f} %*<br>(".replace("-", "−")
        assert found[f"Against {other}"].str.startswith(change).all()
    assert found["Training tokens"].tolist() == ["20,000", "30,000"] and set(found["Runs"]) == {1}
    assert found["Validation PPL"].iloc[0] == f"{tuned}.0"
    assert found["Last PPL above best"].iloc[0] == "+10.0 %, 2 epochs later"
    assert recipe.beside([NOTHING], [NOTHING], ["A"]).empty and recipe.beside([NOTHING], others, ["A"]).empty
    alone = recipe.beside([mine], [mine, NOTHING], ["A", "tuned-A"])  # no model is set against itself
    assert len(alone) == 2 and not any(name.startswith("Against") for name in alone)


def test_several_tuned_runs_against_a_single_one_are_single_runs(outputs):
    mine = grid(outputs, "tuned", {"tuned-A": (-0.3, 500)}, pairs=((42, 0), (43, 1)))
    once, twice = (
        recipe.beside([mine], [grid(outputs, name, {"A": (-0.3, 800)}, **pairs)], ["A"])["Against A (ppmi)"]
        for name, pairs in (("study", {}), ("again", {"pairs": ((42, 0), (43, 1))}))
    )
    assert once.str.startswith("−37.5 %*<br>(").all() and twice.str.startswith("−37.5 %<br>(").all()


def test_runs_of_two_grids_pair_by_the_seed_they_share(outputs):
    """Each grid numbers its replicates for itself; run 42 of one is not to be set against run 43 of the other."""
    hard = {42: 0.0, 43: 0.3, 44: -0.2}  # nats that a seed adds to every model

    def laws(label, ppl, name, seeds):
        chance = {"chance": lambda _, size, seed, __: hard[seed]}
        return grid(outputs, name, {label: (-0.3, ppl)}, pairs=[(seed, seed - 42) for seed in seeds], **chance)

    mine, study = laws("tuned-A", 400, "tuned", (42, 43)), laws("A", 800, "study", (43, 44, 42))
    assert (
        recipe.beside([mine], [study], ["A"])["Against A (ppmi)"].str.startswith("−50.0 %<br>(").tolist() == [True] * 2
    )
    less = laws("tuned-A-without", 600, "less", (43,))
    (effect,) = recipe.ingredients(mine, less)["effect"]
    assert effect.estimate == pytest.approx(math.log(1.5)) and effect.n == 2  # a pair a size


def test_runs_on_other_text_and_runs_that_end_at_their_best(outputs):
    runs, history, losses = grid(outputs, "tuned", {"tuned-A": (-0.3, 500)})
    other = grid(outputs, "study", {"A": (-0.3, 800)})
    others = (*other[:2], other[2].assign(tokens=other[2]["tokens"] + 1))
    runs = runs.assign(best_epoch=runs["epochs_run"], overfit_rate=0.0)
    found = recipe.beside([(runs, history, losses)], [others], ["A"])
    assert set(found["Last PPL above best"]) == {"0.0 %, 0 epochs later"}
    assert not any(name.startswith("Against") for name in found)


def test_the_joint_recipe_is_set_against_the_tuned_one_of_the_same_name(outputs):
    tuned = grid(
        outputs, "tuned", {"tuned-A": (-0.3, 500), "tuned-B": (-0.3, 600)}, {"tuned-A": (6, 1), "tuned-B": (3, 1)}
    )
    joint = grid(
        outputs, "joint", {"joint-A": (-0.3, 450), "joint-C": (-0.3, 100)}, {"joint-A": (6, 1), "joint-C": (3, 1)}
    )
    found = recipe.counterparts([tuned, joint, NOTHING], "joint")
    assert found["experiment"].tolist() == ["joint-A"] * 2 and found["against"].tolist() == ["tuned-A"] * 2
    assert [found.log_ppl for found in found["difference"]] == pytest.approx([math.log(0.9)] * 2)
    table = recipe.counterparts_table(found)
    assert table["Change of PPL"].str.startswith("−10.0 %* (").all() and table["Its PPL"].iloc[0] == "500.0"
    elsewhere = (*joint[:2], joint[2].assign(tokens=joint[2]["tokens"] + 1))
    for nothing in ([tuned, NOTHING], [NOTHING, NOTHING], [NOTHING, joint], [tuned, elsewhere]):
        assert recipe.counterparts_table(recipe.counterparts(nothing, "joint")).empty
    slow = grid(outputs, "slow", {"slow-A": (-0.3, 405)}, {"slow-A": (6, 1)})
    found = recipe.counterparts([tuned, joint, slow], "slow")
    assert found["against"].tolist() == ["joint-A"] * 2
    assert [found.log_ppl for found in found["difference"]] == pytest.approx([math.log(0.9)] * 2)
    laws = {"LSTM": (-0.3, 500), "LSTM-slow": (-0.3, 440), "Transformer-slow": (-0.3, 450)}
    networks = grid(outputs, "networks", laws, dict.fromkeys(laws, (6, 1)))
    found = recipe.counterparts([networks], "-slow")
    assert found[["experiment", "against"]].to_numpy().tolist() == [["LSTM-slow", "LSTM"]] * 2
    assert recipe.counterparts([networks], "slow").empty


def test_what_an_ingredient_is_worth_is_the_change_without_it(outputs):
    mine = grid(outputs, "tuned", {"tuned-A": (-0.3, 500)})
    scale, rate = "tuned-A-without-scale", "tuned-A-without-rate"
    plant(outputs, {scale: (-0.3, 550)}, SIZES, "less", shapes={scale: (6, 128)}, logit_scale=2.0)
    plant(outputs, {rate: (-0.3, 600)}, SIZES, "less", shapes={rate: (6, 128)}, phase2_learning_rate=0.004)
    less = read_grid("less")
    less[0]["dtype"] = "bfloat16"  # another machine is no ingredient
    found = recipe.ingredients(mine, less)
    assert found["experiment"].tolist() == [rate, scale]
    assert [effect.estimate for effect in found["effect"]] == pytest.approx([math.log(1.2), math.log(1.1)])
    assert found["changed"].tolist() == ["phase2_learning_rate = 0.004", "logit_scale = 2.0"] and set(
        found["against"]
    ) == {"tuned-A"}
    table = recipe.ingredients_table(found)
    assert table["Change of PPL"].str.startswith("+20.0 %* (").tolist() == [True, False]
    assert table["Pairs"].tolist() == [2, 2]
    going = (less[0].assign(epochs_run=less[0]["best_epoch"]), *less[1:])  # no over-fitting yet
    assert (
        recipe.ingredients_table(recipe.ingredients(mine, going))["Over-fitting, %"].tolist() == ["no early stop"] * 2
    )
    assert recipe.ingredients(NOTHING, mine).empty and recipe.ingredients(mine, NOTHING).empty
    assert recipe.ingredients_table(recipe.ingredients(mine, NOTHING)).empty
