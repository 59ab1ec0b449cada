"""Parameters: what is refused, what identifies a run, and how a grid file becomes runs."""

import math
import re

import pytest
import yaml

from ctxlm.config import NOTEBOOKS, Experiment, load_grid, parameters_list, read_yaml
from ctxlm.files import ROOT
from tests.conftest import refusal

FIELDS = Experiment.model_fields
GRIDS = sorted(file.stem for file in (ROOT / "params" / "grids").glob("*.yaml"))


# What is refused


BOUNDS = {
    # One parameter of each kind
    "phase2_epochs": [0, 10**9 + 1, 2.5, True, math.nan, math.inf, 1e300, "no such: thing", None, [1], {"a": 1}],
    "held_out_tokens": [-1, 10**9 + 1],
    "context_dim": [1, 65_537],
    "seed": [-1, 2**32],
    "dist_reg_weight": [-0.1, 1.1],
    "dropout": [-0.1, 1],
    "phase2_init_std": [0, 1e31, True, math.nan, math.inf, "no such: thing", None, [1]],
    "train_sample_tokens": [0, True, ""],  # or null
    "phase2_shuffle": [2, "no such: thing", None],
    "dtype": ["float16", True, None],
    # With bounds of their own
    "data_seed": [-1, 60], "num_layers": [0, 1025], "num_input_tokens": [0, 65], "leak": [0, 1.1],
    "phase1_context_noise": [-0.1, 1e31], "validations_per_epoch": [0, 101], "weight_decay": [-0.1, 101],
    "ngram_order": [0, 65],
    # Words
    "experiment": ["", "a/b", "-a", "A\n", "a" * 61, 7, None],
    "corpus": ["chitchat+other", "a.doc", "chitchat\n", "a\x1b[31m.txt"],
    "judged_corpus": ["", "a.doc"],
    "embedding": ["word2vec", "ppmi\n", "a\x1b[31m.safetensors"],
    "device": ["gpu", "cpu\n", "cuda:01"],
}  # fmt: skip
"""What parameters cannot be, by hand, since their schema is what may be wrong."""


@pytest.mark.parametrize("name", BOUNDS)
def test_a_bad_value_is_refused_with_parameter_and_value(name):
    for value in BOUNDS[name]:
        assert refusal(Experiment.from_mapping, {name: value}).startswith(f"{name} = {value!r}: "), value


@pytest.mark.parametrize(("name", "meant"), [("num_layer", "num_layers"), ("SEED", "docs/parameters.md")])
def test_an_unknown_name_is_refused_with_what_may_be_meant(name, meant):
    message = refusal(Experiment.from_mapping, {name: 3, "context_dim": 0})
    assert message == refusal(Experiment, **{name: 3, "context_dim": 0})
    assert f"{name} = 3 " in message and meant in message and "context_dim = 0" in message


@pytest.mark.parametrize(
    "values",
    [
        {"phase2_batch_size": 512, "phase2_context_window": 7},
        {"context_ablation": "zero", "phase2_context_window": 8},
        {"context_rank": 8, "phase2_context_window": 1},
        {"phase2_shuffle": True, "phase2_context_window": 1},
        {"context_rank": 769, "context_dim": 768},
        {"embedding_turned": 768, "embed_dim": 768},
        {"corpus": "sotu+chitchat", "judged_corpus": "sotu"},
        {"corpus": "mine.txt", "judged_corpus": "mine.txt"},
        {"embedding": "gpt2", "embed_dim": 128},
        {"embedding": "smollm2", "embed_dim": 577},
        {"ngram_second_half": True, "model": "lstm"},
        {"hidden_dim": 30, "num_heads": 8, "model": "transformer"},
        {"phase2_batch_size": 512, "window": 30, "model": "lstm"},
        {"design": "echo"},
        {"leak": 0.5, "design": "constant"},
        {"validations_per_epoch": 4, "phase2_batch_size": 512, "train_tokens": 1_000},
    ],
)
def test_values_that_contradict_each_other_are_refused(values):
    message = refusal(Experiment.from_mapping, values)
    assert all(f"{name} = {value!r}" in message for name, value in [*values.items()][:2])


def test_a_plus_in_the_name_of_a_file_is_no_mixture():
    assert Experiment(corpus="data/a+train.txt", judged_corpus="data/a+test.txt")


# What identifies a run


def test_later_values_win_and_numbers_may_be_written_as_text():
    later = Experiment.from_mapping({"num_layers": 6, "seed": 1}, {"num_layers": "3", "weight_decay": "1e-4"})
    assert later == Experiment(num_layers=3, seed=1, weight_decay=0.0001)


def test_a_finished_run_has_its_experiment_again():
    e = Experiment(train_tokens=7_000, device="cuda", dtype="bfloat16", judged_corpus="sotu")
    row = e.model_dump() | {"embedding_turned": math.nan, "test_ppl": 2.0}  # as a table has it
    assert Experiment.of_run(row) == e.model_copy(update={"device": "cpu", "dtype": "float32"})


# A notebook's namespace

CELL = "corpus = 'chitchat'\noutput_dir = None"


@pytest.mark.parametrize("cells", [[CELL, "# Parameters\n{} = 3"], [f"{CELL}\n{{}} = 3"]], ids=["papermill", "by hand"])
def test_a_notebooks_parameters_are_read_and_a_misspelt_one_is_refused(cells):
    def given(name):
        run = {"In": ["", *(cell.format(name) for cell in cells)]}
        return {"__name__": "__main__", "corpus": "chitchat", "output_dir": None, name: 3} | run

    assert Experiment.from_namespace(given("num_layers"), NOTEBOOKS["context"]) == Experiment(num_layers=3)
    message = refusal(Experiment.from_namespace, given("num_layer"), NOTEBOOKS["context"])
    assert message.startswith("num_layer = 3 ") and "num_layers" in message


# Parameter files


def test_base_files_hold_what_their_models_read_with_its_defaults():
    base = read_yaml("params/base.yaml")
    assert list(base.items()) == list(Experiment().for_notebook().items())
    assert Experiment.from_mapping(base) == Experiment()
    others = read_yaml("params/baselines/base.yaml")
    assert others == Experiment(model="kneser-ney").for_notebook()
    for path in (ROOT / "params" / "baselines").glob("*.yaml"):
        assert set(read_yaml(path)) <= set(others)


def test_the_list_of_parameters_is_the_written_one():
    listed = parameters_list()
    assert (ROOT / "docs" / "parameters.md").read_text(encoding="utf-8") == listed
    assert re.findall(r"^- `(\w+)` \(", listed, re.M) == list(FIELDS)
    assert all(field.description for field in FIELDS.values())


# Grids


@pytest.fixture
def grid(tmp_path):
    """Writes the grid file `mine`, or another, without what is None; returns its path."""

    def write(name="mine", **content):
        path = tmp_path / f"{name}.yaml"
        content = {"title": "Mine", "experiments": {"A": {}}} | content
        content = {key: value for key, value in content.items() if value is not None}
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return str(path)

    return write


def test_a_grid_crosses_experiments_with_swept_values(grid, tmp_path):
    (tmp_path / "wide.yaml").write_text("experiment: other\nnum_layers: 3\ncontext_dim: 64\n", encoding="utf-8")
    wide = str(tmp_path / "wide.yaml")
    file = grid(
        common=["params/B.yaml", {"embed_dim": 32, "context_dim": 32}],
        experiments={"narrow": None, "wide": wide, "wider": [wide, {"context_dim": 99}]},
        sweep={"train_tokens": [100, 200], "phase2_learning_rate, data_seed": [[0.001, 0], [1.0e-5, 5]]},
    )
    plan = load_grid(file)
    assert (plan.name, plan.title, plan.description) == ("mine", "Mine", "") and len(plan.runs) == 3 * 2 * 2
    assert list(plan.runs)[:2] == [
        "narrow_train_tokens-100_phase2_learning_rate-0.001_data_seed-0",
        "narrow_train_tokens-100_phase2_learning_rate-1e-05_data_seed-5",
    ]
    shapes = {run.experiment: (run.num_layers, run.context_dim, run.embed_dim) for run in plan.runs.values()}
    assert shapes == {"narrow": (3, 32, 32), "wide": (3, 64, 32), "wider": (3, 99, 32)}
    run = plan.runs["wide_train_tokens-200_phase2_learning_rate-0.001_data_seed-0"]
    expected = {"experiment": "wide", "num_layers": 3, "context_dim": 64, "embed_dim": 32, "train_tokens": 200}
    assert run == Experiment.from_mapping(expected, {"phase2_learning_rate": 0.001})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"swep": {}}, "swep = {}"),
        ({"experiments": None, "experiment": {"A": {}}}, "did you mean experiments?"),
        ({"experiments": {"a b": {}}}, "run a b: "),
        ({"experiments": {"A": {}, "B": {"num_layers": 0}}}, "run B: num_layers = 0"),
        ({"experiments": {"A": {}, "B": "params/C.yaml"}}, "experiment B: params/C.yaml "),
        ({"experiments": {"report": {}}}, "run report: "),
        ({"common": "params/C.yaml"}, "params/C.yaml"),
        ({"sweep": {"seed": [42, 43, 42]}}, "run A_seed-42: "),
        ({"sweep": {"seed": [1, 2], "seed, data_seed": [[1, 0], [2, 30]]}}, "seed stands in two lines"),
        ({"sweep": {"seed, data_seed": [1, 2]}}, "'seed, data_seed'"),
        ({"sweep": {"seed, data_seed": [[1, 0], [2]]}}, "'seed, data_seed'"),
        ({"experiments": {"A": {"seed": 7}}, "sweep": {"seed": [1, 2]}}, "run A_seed-1: 'sweep' would override seed"),
        ({"sweep": {"corpus": ["texts/mine.txt"]}}, "run A_corpus-texts/mine.txt: "),
        ({"sweep": {"corpus": ["a" * 200 + ".txt"]}}, "run A_corpus-aaa"),
        ({"experiments": {"L": {"model": "lstm", "design": "arithmetic"}}}, "run L: design = 'arithmetic'"),
        ({"sweep": {"window": [16, 32]}}, "run A_window-16: window = 16"),
    ],
)
def test_a_grid_file_that_cannot_be_used_is_named_with_the_reason(grid, content, words):
    file = grid(**content)
    message = refusal(load_grid, file)
    assert message.startswith(file) and words in message and "Mine" not in message  # the file is not printed whole


def test_a_name_that_is_given_twice_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_text("title: Mine\nexperiments:\n  A: {seed: 1}\n  A: {seed: 2}\n")
    assert "A is given twice" in refusal(load_grid, str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize("name", ["study", "site", "a b", ".hidden"])
def test_a_grids_file_has_a_name_that_can_be_its_folders_and_is_not_ours(grid, name):
    file = grid(name)
    assert refusal(load_grid, file).startswith(file)
    assert load_grid("params/grids/study.yaml").runs == load_grid("study").runs


def test_a_missing_grid_is_answered_with_the_nearest_or_where_all_stand():
    assert "did you mean quick?" in refusal(load_grid, "quikc")
    assert "docs/grids.md" in refusal(load_grid, "xyz")
    assert "missing.yaml" in refusal(load_grid, "params/grids/missing.yaml")


# The repository's grids


def test_the_study_grid_is_the_study_in_five_replicates():
    shapes, drawn = {"A": (6, 768), "B": (3, 1536)}, {"seed", "data_seed", "embedding_seed"}
    free = {"experiment", "num_layers", "context_dim", "train_tokens"} | drawn
    runs = list(load_grid("study").runs.values())
    assert len(runs) == 20 and len({tuple(run.model_dump(include=drawn).values()) for run in runs}) == 5
    assert {(run.experiment, run.train_tokens) for run in runs} == {(x, n) for x in "AB" for n in (86_925, 183_620)}
    for run in runs:
        assert (run.num_layers, run.context_dim) == shapes[run.experiment]
        assert run.model_dump(exclude=free) == Experiment().model_dump(exclude=free)


def test_logits_spread_alike_at_every_width():
    for width, scale in {768: 0.204, 576: 0.236, 128: 0.5}.items():
        recipe = Experiment.from_mapping(read_yaml("params/stabilised.yaml"), {"embed_dim": width})
        assert recipe.logit_scale == scale == Experiment(**recipe.model_dump()).logit_scale


def test_grids_that_say_so_are_stabilised():
    others = {"depth", "depth-full", "designs", "dtype", "quick", "random", "sizes"}
    stabilised = [name for name in GRIDS if "stabilised" in name or name in others]
    mixed = [run for name in ("chance", "signs", "rank") for run in load_grid(name).runs.values()]
    runs = [run for name in stabilised for run in load_grid(name).runs.values()]
    runs += [run for run in mixed if run.experiment.startswith("stabilised-")]
    assert len(runs) > 200
    for run in runs:
        assert (run.output_bias, run.phase2_init_std) == ("unigram", 0.01)
        assert run.logit_scale == pytest.approx(math.sqrt(32 / run.embed_dim), rel=0.03)
