"""Parameters: what is refused, what identifies a run, and how a grid file becomes runs."""

import json
import math
import re

import pytest
import yaml

from ctxlm.config import NOTEBOOKS, Experiment, load_grid, parameters_list, read_yaml
from ctxlm.files import ROOT
from tests.conftest import refusal

FIELDS = Experiment.model_fields
SCHEMA = Experiment.model_json_schema()["properties"]
GRIDS = sorted(file.stem for file in (ROOT / "params" / "grids").glob("*.yaml"))


# What is refused


BOUNDS = {
    "data_seed": [60], "embedding_seed": [2**32], "num_layers": [0, 1025], "context_dim": [1, 65_537],
    "num_input_tokens": [65], "leak": [0, 1.1], "dist_reg_weight": [1.1], "phase2_learning_rate": [0],
    "validations_per_epoch": [101], "dropout": [1], "slow_decay": [1], "weight_decay": [101], "logit_scale": [0],
    "experiment": ["", "a/b", "-a"], "corpus": ["chitchat+other", "a.doc"], "device": ["gpu"], "dtype": ["float16"],
}  # fmt: skip
"""By hand, since the schema that the others come from is what may be wrong."""


def bad_values(name):
    """What a parameter cannot be, by its schema: a new one has its rows by itself."""
    yield from BOUNDS.get(name, [])
    kinds = {kind["type"]: kind for kind in SCHEMA[name].get("anyOf", [SCHEMA[name]])}
    number = kinds.get("integer") or kinds.get("number")
    yield from ([1], {"a": 1}, "no such: thing", "" if "null" in kinds else None)
    if number:
        yield from (True, math.nan, math.inf, 1e300)
        yield number.get("minimum", 0) - 1 if "exclusiveMinimum" not in number else number["exclusiveMinimum"]
    if "exclusiveMaximum" in (number or {}):
        yield number["exclusiveMaximum"]
    if "integer" in kinds:
        yield 2.5
    if "string" in kinds:
        yield from (7, f"{FIELDS[name].default}\n", f"{FIELDS[name].default}\x1b[31m")


@pytest.mark.parametrize("name", FIELDS)
def test_a_bad_value_is_refused_with_parameter_and_value(name):
    for value in bad_values(name):
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
        {"context_ablation": "zero", "slow_decay": 0.9},
        {"context_rank": 8, "phase2_context_window": 1},
        {"phase2_shuffle": True, "phase2_context_window": 1},
        {"context_rank": 769, "context_dim": 768},
        {"embedding_turned": 768, "embed_dim": 768},
        {"corpus": "sotu+chitchat", "judged_corpus": "sotu"},
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


# What identifies a run


def test_experiments_survive_json_and_yaml_in_any_order():
    changed = {"corpus": "texts/mine.txt", "train_tokens": 5, "judged_corpus": None, "phase2_learning_rate": 1e-05}
    experiment = Experiment.from_mapping(changed)
    backwards = dict(reversed(experiment.model_dump().items()))
    for reread in (json.loads(json.dumps(backwards)), yaml.safe_load(yaml.safe_dump(backwards, sort_keys=False))):
        again = Experiment.from_mapping(reread)
        assert again == experiment
    later = Experiment.from_mapping({"num_layers": 6, "seed": 1}, {"num_layers": "3", "weight_decay": "1e-4"})
    assert later == Experiment(num_layers=3, seed=1, weight_decay=0.0001)  # numbers may be written as text


def test_a_finished_run_has_its_experiment_again():
    e = Experiment(train_tokens=7_000, device="cuda", dtype="bfloat16", judged_corpus="sotu")
    row = e.model_dump() | {"embedding_turned": math.nan, "test_ppl": 2.0}  # as a table has it
    assert Experiment.of_run(row) == e.model_copy(update={"device": "cpu", "dtype": "float32"})


# A notebook's namespace

CONTEXT = NOTEBOOKS["context"]
PARAMETERS = "corpus = 'chitchat'\noutput_dir = None\ntrain_tokens = 10_000\nnum_layers = 6"


def in_jupyter(*cells, **values):
    """The names of a kernel in which the parameters' cell was run, then others, whose values these are."""
    names = {"__name__": "__main__", "_": "", "Out": {}, "json": json, "train_tokens": 10_000, "num_layers": 6}
    return names | values | {"In": ["", PARAMETERS, *cells]}


@pytest.mark.parametrize("value", [1, "text", None, {"num_layers": 3}])
def test_what_papermill_puts_into_a_notebook_is_read_and_refused_if_unknown(value):
    known = in_jupyter("# Parameters\nnum_layers = 3\noutput_dir = 'x'\n", num_layers=3, output_dir="x")
    assert Experiment.from_namespace(known, CONTEXT) == Experiment(num_layers=3, train_tokens=10_000)
    assert "output_dir" in refusal(Experiment.from_namespace, known, CONTEXT, also=("runs",))
    unknown = in_jupyter(f"# Parameters\nnum_layer = {value!r}\n", num_layer=value)
    message = refusal(Experiment.from_namespace, unknown, CONTEXT)
    assert message.startswith(f"num_layer = {value!r} ") and "num_layers" in message


@pytest.mark.parametrize(
    "line", ["num_layer = 3", "num_layer: int = 3", "seed = 7; num_layer = 3", "a, num_layer = 1, 3"]
)
def test_a_misspelt_name_is_refused_however_it_is_assigned(line):
    for cell in (f"{PARAMETERS}\n{line}", f"%%time\n{PARAMETERS}\n{line}"):  # the latter is no Python
        names = in_jupyter(num_layer=3) | {"In": ["", cell]}
        assert "num_layers" in refusal(Experiment.from_namespace, names, CONTEXT)


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
    """Writes the grid file `mine`, or another; returns its path."""

    def write(name="mine", **content):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"title": "Mine", "experiments": {"A": {}}} | content, sort_keys=False))
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
        ({"experiments": {}}, "experiments = {}"),
        ({"experiments": {"A": [1]}}, "experiments.A = "),
        ({"experiments": {"a b": {}}}, "run a b: "),
        ({"experiments": {"A": {}, "B": {"num_layers": 0}}}, "run B: num_layers = 0"),
        ({"experiments": {"A": {}, "B": "params/C.yaml"}}, "experiment B: params/C.yaml "),
        ({"experiments": {"report": {}}}, "run report: "),
        ({"experiments": {"corpus-2": {}}}, "run corpus-2: "),
        ({"common": "params/C.yaml"}, "params/C.yaml"),
        ({"common": {"num_layer": 3}}, "run A: num_layer = 3"),
        ({"sweep": {"seed": []}}, "sweep.seed = []"),
        ({"sweep": {"seed": [42, 43, 42]}}, "run A_seed-42: "),
        ({"sweep": {"seed": [1, 2], "seed, data_seed": [[1, 0], [2, 30]]}}, "seed stands in two lines"),
        ({"sweep": {"seed, data_seed": [1, 2]}}, "'seed, data_seed'"),
        ({"sweep": {"seed, data_seed": [[1, 0], [2]]}}, "'seed, data_seed'"),
        ({"experiments": {"A": {"seed": 7}}, "sweep": {"seed": [1, 2]}}, "run A_seed-1: 'sweep' would override seed"),
        ({"experiments": {"A": ["params/B.yaml", {"seed": 7}]}, "sweep": {"seed": [1, 2]}}, "seed"),
        ({"sweep": {"corpus": ["texts/mine.txt"]}}, "run A_corpus-texts/mine.txt: "),
        ({"sweep": {"corpus": ["a" * 200 + ".txt"]}}, "run A_corpus-aaa"),
        ({"experiments": {"L": {"model": "lstm", "design": "arithmetic"}}}, "run L: design = 'arithmetic'"),
        ({"sweep": {"window": [16, 32]}}, "run A_window-16: window = 16"),
    ],
)
def test_a_grid_file_that_cannot_be_used_is_named_with_the_reason(grid, content, words):
    file = grid(**content)
    message = refusal(load_grid, file)
    assert message.startswith(file) and words in message


def test_a_grid_file_without_experiments_is_not_printed_whole(tmp_path):
    (tmp_path / "mine.yaml").write_text("title: Mine\nexperiment: {A: {}}\n")
    message = refusal(load_grid, str(tmp_path / "mine.yaml"))
    assert "did you mean experiments?" in message and "experiments is missing" in message and "Mine" not in message


def test_a_name_that_is_given_twice_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_text("title: Mine\nexperiments:\n  A: {seed: 1}\n  A: {seed: 2}\n")
    assert "A is given twice" in refusal(load_grid, str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize("name", ["study", "site", "a b", ".hidden"])
def test_a_grids_file_has_a_name_that_can_be_its_folders_and_is_not_ours(grid, name):
    file = grid(name)
    assert refusal(load_grid, file).startswith(file)
    assert load_grid("params/grids/study.yaml").runs == load_grid("study").runs


def test_a_missing_grid_is_answered_with_the_known_ones():
    assert all(known in refusal(load_grid, "quikc") for known in ("'quikc'", *GRIDS))
    assert "missing.yaml" in refusal(load_grid, "params/grids/missing.yaml")


# The repository's grids


@pytest.mark.parametrize("name", GRIDS)
def test_no_grid_of_the_repository_has_a_run_twice(name):
    plan = load_grid(name)
    assert plan.name == name and plan.title and plan.description
    unnamed = {run.model_copy(update={"experiment": "any"}) for run in plan.runs.values()}
    assert len(unnamed) == len(plan.runs) > 0


def test_the_study_grid_is_the_study_in_five_replicates():
    shapes, drawn = {"A": (6, 768), "B": (3, 1536)}, {"seed", "data_seed", "embedding_seed"}
    free = {"experiment", "num_layers", "context_dim", "train_tokens"} | drawn
    runs = list(load_grid("study").runs.values())
    assert len(runs) == 20 and len({tuple(run.model_dump(include=drawn).values()) for run in runs}) == 5
    assert {(run.experiment, run.train_tokens) for run in runs} == {(x, n) for x in "AB" for n in (86_925, 183_620)}
    for run in runs:
        assert (run.num_layers, run.context_dim) == shapes[run.experiment]
        assert run.model_dump(exclude=free) == Experiment().model_dump(exclude=free)


def test_logits_of_every_sound_run_spread_alike():
    for width, scale in {768: 0.204, 576: 0.236, 128: 0.5}.items():
        recipe = Experiment.from_mapping(read_yaml("params/stabilised.yaml"), {"embed_dim": width})
        assert recipe.logit_scale == scale == Experiment(**recipe.model_dump()).logit_scale
    stabilised = [
        name for name in GRIDS if "stabilised" in name or name in ("depth", "depth-full", "designs", "sizes", "quick")
    ]
    mixed = [run for name in ("chance", "signs", "rank", "random", "dtype") for run in load_grid(name).runs.values()]
    runs = [run for name in stabilised for run in load_grid(name).runs.values()]
    runs += [run for run in mixed if run.experiment.startswith("sound-")]
    assert len(runs) > 200
    for run in runs:
        assert (run.output_bias, run.phase2_init_std) == ("unigram", 0.01)
        assert run.logit_scale == pytest.approx(math.sqrt(32 / run.embed_dim), rel=0.03)
