"""Parameters: what is refused and how, what identifies a run, and how a grid file becomes runs."""

import json
import math
import re
import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ctxlm.config import (
    BASELINES_ALONE,
    CONTEXT_ALONE,
    MOST_WEIGHTS,
    ConfigError,
    Experiment,
    load_grid,
    parameters_table,
    read_yaml,
)
from ctxlm.files import ROOT

FIELDS = Experiment.model_fields
GRIDS = sorted(file.stem for file in (ROOT / "params" / "grids").glob("*.yaml"))


def refusal(call, *arguments, **keywords) -> str:
    """The message of the ConfigError that the call must raise, one line of text."""
    with pytest.raises(ConfigError) as caught:
        call(*arguments, **keywords)
    message = str(caught.value)
    assert message.strip() == message and "\n" not in message
    return message


# What is refused


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("num_layer", 3, "did you mean num_layers?"),
        ("phase2_learningrate", 0.1, "did you mean phase2_learning_rate?"),
        ("lerning_rate", 0.1, "did you mean phase1_learning_rate or phase2_learning_rate?"),
        ("xyz", 1, "see docs/parameters.md"),
        ("train_capacity_tokens", 9, "is not a parameter: "),  # gone with protocol 2
        ("train_capacity_samples", 9, "is not a parameter: "),
        ("phase2_weight_decay", 0.1, "is not a parameter: "),  # gone with the trainer
        ("phase2_dropout", 0.1, "is not a parameter: "),
        ("phase2_label_smoothing", 0.1, "is not a parameter: "),
        (1, 2, "is not a parameter"),
        ("num_layers", "3", "write it without quotes"),
        ("phase1_learning_rate", "1e-4", "write 1.0e-4"),
        ("device", "gpu", "auto, cpu, cuda or cuda:N"),
        ("embedding", "glove", "choose ppmi, smollm2, random, gpt2 or a .safetensors file"),
        ("corpus", "chitcat", "several joined by +, or a .txt, .jsonl or .parquet file"),
        ("dtype", "float16", "'float32' or 'bfloat16'"),
        ("experiment", "a b", "letters, digits, '.', '_' and '-' only"),
    ],
)
def test_a_bad_value_is_one_sentence_with_parameter_value_and_remedy(name, value, remedy):
    message = refusal(Experiment.from_mapping, {name: value})
    assert message.startswith(f"{name} = {value!r} is not ")
    assert remedy in message
    assert message.count(" = ") == 1 and "^" not in message


def test_every_bad_value_is_named():
    message = refusal(Experiment.from_mapping, {"context_dim": 0, "num_layer": 6})
    assert sorted(part.split(" = ")[0] for part in message.split("; ")) == ["context_dim", "num_layer"]


@pytest.mark.parametrize(
    ("values", "remedy"),
    [
        ({"train_tokens": 20_000, "train_samples": 50}, "give exactly one"),
        ({"train_tokens": None, "train_samples": None}, "give exactly one"),
        ({"phase1_min_iterations": 5, "phase1_max_iterations": 4}, "lower the first or raise the second"),
        ({"phase2_batch_size": 512, "phase2_context_window": 7}, "first must be a multiple of the second"),
        ({"phase2_context_window": 8, "context_ablation": "zero"}, "set one to its default"),
        ({"slow_decay": 0.9, "context_ablation": "zero"}, "set one to its default"),
        ({"context_rank": 8, "context_ablation": "zero"}, "set one to its default"),
        ({"context_rank": 8, "phase2_context_window": 1}, "set one to 0"),
        ({"context_rank": 769, "context_dim": 768}, "lower the first"),
        ({"embedding_turned": 768, "embedding": "ppmi", "embed_dim": 768}, "set the first to null"),
        ({"embedding_turned": 1, "embedding": "random", "embed_dim": 768}, "set the first to null"),
        ({"embedding_rotated": True, "embedding": "random", "embedding_seed": 1}, "set the first to false"),
        ({"embedding_rotated": True, "embedding": "ppmi", "embedding_seed": 0}, "set the first to false"),
        ({"ngram_second_half": True, "model": "context"}, "set the first to false"),
        ({"hidden_dim": 30, "num_heads": 8, "model": "transformer"}, "change one of them"),
        ({"phase2_batch_size": 512, "window": 30, "model": "lstm"}, "first must be a multiple of the second"),
    ],
)
def test_values_that_contradict_each_other_are_refused(values, remedy):
    message = refusal(Experiment.from_mapping, values)
    said, asked = message.split(": ", 1)
    assert said == " and ".join(f"{name} = {value!r}" for name, value in list(values.items())[: said.count(" = ")])
    assert remedy in asked


def test_a_warm_up_is_held_against_the_updates_that_there_will_be():
    assert Experiment(phase2_warmup_updates=1699).phase2_warmup_updates == 1699
    message = refusal(Experiment.from_mapping, {"phase2_warmup_updates": 1700})  # ten epochs of 86,924 / 512
    assert message.startswith("phase2_warmup_updates = 1700 ") and "phase2_epochs = 10 of 170 updates each" in message
    assert "lower it" in message
    held_out = {"held_out_tokens": 86_925 - 513, "phase2_epochs": 1}  # 512 predictions: a single update
    assert "of 1 updates each" in refusal(Experiment.from_mapping, held_out | {"phase2_warmup_updates": 1})
    unknown = {"train_tokens": None, "train_samples": 1}  # only the corpus tells how many tokens these are
    assert Experiment.from_mapping(unknown, {"phase2_warmup_updates": 1700}).phase2_warmup_updates == 1700


def test_later_mappings_override_earlier_ones():
    experiment = Experiment.from_mapping({"num_layers": 6, "seed": 1}, {"num_layers": 3})
    assert (experiment.num_layers, experiment.seed, experiment.context_dim) == (3, 1, 768)


# What identifies a run

TEXTS = {
    "experiment": ["A", "B", "0-wide_v1.2"],
    "corpus": ["chitchat", "ultrachat", "texts/mine.txt"],
    "embedding": ["ppmi", "random", "gpt2"],
    "device": ["auto", "cpu", "cuda", "cuda:1"],
}


def valid(name: str) -> st.SearchStrategy:
    """Valid values of one parameter."""
    kind, default = FIELDS[name].annotation, FIELDS[name].default
    if name in TEXTS:
        return st.sampled_from(TEXTS[name])
    if typing.get_origin(kind) is typing.Literal:
        return st.sampled_from(typing.get_args(kind))
    if isinstance(default, bool):
        return st.booleans()
    if isinstance(default, float):
        return st.floats(0, 1, exclude_min=True, exclude_max=True)
    if type(None) in typing.get_args(kind):
        return st.none() | st.integers(1, 10**7)
    bounds = FIELDS[name].metadata
    low = max([1, *(bound.ge for bound in bounds if hasattr(bound, "ge"))])
    high = [bound.le for bound in bounds if hasattr(bound, "le")]
    high += [bound.lt - 1 for bound in bounds if hasattr(bound, "lt")]
    return st.integers(low, min([10**7, *high]))


@st.composite
def parameters(draw) -> dict:
    """Every parameter, with values that agree with one another."""
    values = draw(st.fixed_dictionaries({name: valid(name) for name in FIELDS}))
    given_size = draw(st.sampled_from(["train_tokens", "train_samples"]))
    values |= {"train_tokens": None, "train_samples": None, given_size: draw(st.integers(1, 10**7))}
    values["num_layers"] = min(values["num_layers"], MOST_WEIGHTS // values["context_dim"] ** 2)
    if values["model"] in ("lstm", "transformer"):
        values |= {"use_weight_tying": True, "phase2_shuffle": False}
        values |= {"design": "constant", "context_ablation": "none", "phase2_init_std": 0.1}
        values["context_rank"] = 0
        values["phase2_batch_size"] = values["window"] * draw(st.integers(1, 10))
        values["num_heads"] = draw(st.integers(1, 64))
        values["hidden_dim"] = values["num_heads"] * draw(st.integers(1, 10))
        values["phase2_context_window"] = 0
    elif draw(st.booleans()):
        values["phase2_batch_size"] = values["phase2_context_window"] * draw(st.integers(1, 10))
        values |= {"context_ablation": "none", "context_rank": 0}
    else:
        values |= {"phase2_context_window": 0, "slow_decay": 0.0}
        values["context_rank"] = draw(st.integers(0, values["context_dim"] * (values["context_ablation"] == "none")))
    values["embedding_seed"] *= values["embedding"] != "gpt2"
    values["embedding_rotated"] &= values["embedding"] == "ppmi" and values["embedding_seed"] > 0
    turned = draw(st.none() | st.integers(0, values["embed_dim"] - 1))
    values["embedding_turned"] = turned if values["embedding"] == "ppmi" else None
    values["ngram_second_half"] &= values["model"] == "kneser-ney"
    targets = (values["train_tokens"] or 0) - values["held_out_tokens"] - 1
    if targets > 0:  # the warm-up is over before the training
        values["phase2_warmup_updates"] %= values["phase2_epochs"] * math.ceil(targets / values["phase2_batch_size"])
    iterations = sorted([values["phase1_min_iterations"], values["phase1_max_iterations"]])
    return values | dict(zip(["phase1_min_iterations", "phase1_max_iterations"], iterations, strict=True))


@settings(max_examples=50, deadline=None)
@given(values=parameters(), data=st.data())
def test_an_experiment_survives_json_and_yaml_in_any_order(values, data):
    experiment = Experiment.from_mapping(values)
    written = experiment.model_dump()
    assert written == values
    shuffled = dict(data.draw(st.permutations(list(written.items()))))
    for reread in (json.loads(json.dumps(shuffled)), yaml.safe_load(yaml.safe_dump(shuffled, sort_keys=False))):
        again = Experiment.from_mapping(reread)
        assert again == experiment
        assert again.params_hash == experiment.params_hash


@settings(max_examples=200, deadline=None)
@given(values=parameters(), data=st.data())
def test_any_changed_parameter_changes_the_hash(values, data):
    name = data.draw(st.sampled_from([name for name in FIELDS if name != "design"]))
    other = data.draw(valid(name))
    assume(other != values[name])
    try:
        changed = Experiment.from_mapping(values | {name: other})
    except ConfigError:
        assume(False)
    assert changed.params_hash != Experiment.from_mapping(values).params_hash


def test_a_whole_number_is_the_same_as_its_float():
    assert Experiment(phase1_gradient_clip=1).params_hash == Experiment(phase1_gradient_clip=1.0).params_hash


def test_an_experiment_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Experiment().seed = 1


# A notebook's namespace

IPYTHON = {
    "__name__": "__main__",
    "__doc__": "text",
    "_": "",
    "_i1": "num_layers = 3",
    "_ih": ["", "num_layers = 3"],
    "_oh": {},
    "_exit_code": 0,
    "In": ["", "num_layers = 3"],
    "Out": {},
    "get_ipython": lambda: None,
    "exit": object(),
    "open": open,
    "json": json,
    "Path": Path,
    "Experiment": Experiment,
    "load_grid": load_grid,
}


def test_a_notebooks_parameters_are_found_among_ipythons_names():
    found = Experiment.from_namespace(IPYTHON | {"num_layers": 3, "train_samples": None, "output_dir": "outputs/x"})
    assert found == Experiment(num_layers=3)


@pytest.mark.parametrize("value", [1, 0.5, True, "text", None, [3], {"num_layers": 3}])
def test_an_unknown_value_that_yaml_could_have_put_into_a_notebook_is_refused(value):
    message = refusal(Experiment.from_namespace, IPYTHON | {"num_layer": value})
    assert message == f"num_layer = {value!r} is not a parameter: did you mean num_layers?"


PARAMETERS = "train_tokens = 10_000\nnum_layers = 6"


def by_hand(*cells, **values):
    """The names of a kernel in which the parameters' cell was run, then others, whose values these are."""
    given = {"train_tokens": 10_000, "num_layers": 6} | values
    return IPYTHON | given | {"In": ["", PARAMETERS, *cells, "settings = Experiment.from_namespace(globals())"]}


def test_cells_can_be_run_again_and_others_may_stand_between():
    expected = Experiment(train_tokens=10_000)
    scratch = "for i in range(3):\n    sizes = [i]\nname: str = 'x'"
    namespace = by_hand(scratch, i=2, sizes=[2], name="x", left=0.5, folder=None)
    assert Experiment.from_namespace(namespace) == expected
    again = namespace | {"In": [*namespace["In"], "num_layers = 4", "this is no Python", PARAMETERS, "more = 1"]}
    assert Experiment.from_namespace(again | {"num_layers": 4, "more": 1}).num_layers == 4
    assert "num_layers = '4'" in refusal(Experiment.from_namespace, namespace | {"num_layers": "4"})


@pytest.mark.parametrize(
    ("name", "meant"), [("num_layer", "num_layers"), ("phase2_epoch", "phase2_epochs"), ("traintokens", "train_tokens")]
)
@pytest.mark.parametrize("value", [3, [3], {"a": 3}])
def test_a_misspelt_parameter_is_refused_until_its_cell_is_corrected(name, meant, value):
    misspelt = by_hand(f"{name} = {value}", **{name: value})
    for _ in range(2):
        message = refusal(Experiment.from_namespace, misspelt)
        assert message == f"{name} = {value!r} is not a parameter: did you mean {meant}?"
    corrected = misspelt | {"In": [*misspelt["In"], PARAMETERS, "", "again"]}  # the kernel has the old name still
    assert Experiment.from_namespace(corrected) == Experiment(train_tokens=10_000)


@pytest.mark.parametrize("given", ["xyz = 1", "xyz = 1\ntrain_tokens = 10_000"])
def test_whatever_papermill_injects_is_a_parameter(given):
    namespace = by_hand(f"# Parameters\n{given}\n", "i = 2", xyz=1, i=2)
    assert refusal(Experiment.from_namespace, namespace) == "xyz = 1 is not a parameter: see docs/parameters.md"


def test_names_beside_the_parameters_are_allowed_only_when_listed():
    assert Experiment.from_namespace({"run_name": "x"}, also=("run_name",)) == Experiment()
    assert "output_dir" in refusal(Experiment.from_namespace, {"output_dir": "x"}, also=("run_name",))


# YAML files


def test_a_mapping_may_still_be_merged_into_another(tmp_path):
    (tmp_path / "mine.yaml").write_text("a: &a {b: 1, c: 1}\nd: {<<: *a, b: 2}\n", encoding="utf-8")
    assert read_yaml(tmp_path / "mine.yaml") == {"a": {"b": 1, "c": 1}, "d": {"b": 2, "c": 1}}


def test_the_base_file_holds_every_parameter_of_the_context_model_with_its_default_in_order():
    base = read_yaml("params/base.yaml")
    assert list(base.items()) == list(Experiment().for_notebook().items())
    assert Experiment.from_mapping(base) == Experiment()


def test_other_models_have_a_base_file_of_what_they_read():
    base = read_yaml("params/baselines/base.yaml")
    assert base == Experiment(model="kneser-ney").for_notebook()
    for path in (ROOT / "params" / "baselines").glob("*.yaml"):
        assert set(read_yaml(path)) <= set(base)


def test_a_notebook_is_given_what_its_model_reads():
    """A parameter of other models that a grid gives all of its runs changes nothing, and papermill warns of none."""
    for model in ("context", "kneser-ney", "lstm", "transformer"):
        given = Experiment(model=model).for_notebook()
        assert ("num_heads" in given) == (model != "context") == ("context_dim" not in given)
    assert set(BASELINES_ALONE) | set(CONTEXT_ALONE) <= set(FIELDS) and not set(BASELINES_ALONE) & set(CONTEXT_ALONE)
    assert {name for name in FIELDS if name.startswith("phase1_")} <= set(CONTEXT_ALONE)


def test_the_table_of_parameters_is_the_written_one():
    table = parameters_table()
    assert (ROOT / "docs" / "parameters.md").read_text(encoding="utf-8") == table
    assert re.findall(r"^\| `(\w+)` \|", table, re.M) == list(FIELDS)
    assert all(field.description and field.description in table for field in FIELDS.values())


def test_the_two_configurations_are_the_studys():
    shapes = {}
    for label in "AB":
        values = read_yaml(f"params/{label}.yaml")
        assert set(values) <= set(FIELDS)
        experiment = Experiment.from_mapping(read_yaml("params/base.yaml"), values)
        shapes[experiment.experiment] = (experiment.num_layers, experiment.context_dim, experiment.embed_dim)
    assert shapes == {"A": (6, 768, 768), "B": (3, 1536, 768)}


# Grids


def grid_file(folder: Path, **content) -> str:
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump({"experiments": {"A": {}}} | content, sort_keys=False), encoding="utf-8")
    return str(file)


def test_a_grid_crosses_experiments_with_swept_values(tmp_path):
    (tmp_path / "wide.yaml").write_text("experiment: other\nnum_layers: 3\ncontext_dim: 64\n", encoding="utf-8")
    grid = load_grid(
        grid_file(
            tmp_path,
            title="Mine",
            common={"embed_dim": 32, "context_dim": 32},
            experiments={"narrow": None, "wide": str(tmp_path / "wide.yaml"), "wide-n1": {"num_input_tokens": 1}},
            sweep={"train_tokens": [100, 200], "phase2_learning_rate": [0.001, 1.0e-5]},
        )
    )
    assert (grid.name, grid.title, grid.description) == ("mine", "Mine", "")
    assert len(grid.runs) == 3 * 2 * 2
    assert list(grid.runs)[:2] == [
        "narrow_train_tokens-100_phase2_learning_rate-0.001",
        "narrow_train_tokens-100_phase2_learning_rate-1e-05",
    ]
    run = grid.runs["wide_train_tokens-200_phase2_learning_rate-0.001"]
    expected = {"experiment": "wide", "num_layers": 3, "context_dim": 64, "embed_dim": 32, "train_tokens": 200}
    assert run == Experiment.from_mapping(expected, {"phase2_learning_rate": 0.001})
    assert len({run.params_hash for run in grid.runs.values()}) == len(grid.runs)


def test_what_is_common_may_be_a_parameter_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("common: [params/B.yaml, {seed: 7}]\nexperiments: {wide: {}, narrow: {context_dim: 9}}\n")
    runs = load_grid(str(path)).runs
    assert {run.seed for run in runs.values()} == {7}
    assert (runs["wide"].num_layers, runs["wide"].context_dim) == (3, 1536)
    assert (runs["narrow"].num_layers, runs["narrow"].context_dim) == (3, 9)


def test_an_experiment_may_be_a_list_whose_later_parts_win(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("experiments: {mine: [params/B.yaml, {context_dim: 9}]}\nsweep: {num_layers: [1, 2]}\n")
    runs = load_grid(str(path)).runs
    assert [(run.num_layers, run.context_dim) for run in runs.values()] == [(1, 9), (2, 9)]
    path.write_text("experiments: {mine: [params/B.yaml, {num_layers: 9}]}\nsweep: {num_layers: [1, 2]}\n")
    complaint = "num_layers = 9 of experiment 'mine' would be overridden by 'sweep'"
    assert complaint in refusal(load_grid, str(path))


@pytest.mark.parametrize("label", ["report", "analysis", "dtype", "corpus", "corpus-2"])
def test_a_run_cannot_be_called_as_the_pipelines_own_folders(tmp_path, label):
    file = grid_file(tmp_path, experiments={label: {}}, sweep={})
    message = refusal(load_grid, file)
    assert message.startswith(f"{file}, run {label}: ") and message.endswith(": rename it")


def test_a_grid_of_ones_own_cannot_take_the_folder_of_ours(tmp_path):
    (tmp_path / "study.yaml").write_text("experiments: {A: {}}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"outputs/study belongs to params/grids/study\.yaml: rename your file"):
        load_grid(str(tmp_path / "study.yaml"))
    assert load_grid("params/grids/study.yaml").runs == load_grid("study").runs


def test_parameters_swept_together_change_together(tmp_path):
    grid = load_grid(
        grid_file(
            tmp_path,
            experiments={"A": {}},
            sweep={"train_tokens": [100, 200], "seed, data_seed": [[1, 0], [2, 5]]},
        )
    )
    assert {(run.train_tokens, run.seed, run.data_seed) for run in grid.runs.values()} == {
        (100, 1, 0),
        (100, 2, 5),
        (200, 1, 0),
        (200, 2, 5),
    }
    assert "A_train_tokens-100_seed-2_data_seed-5" in grid.runs
    for wrong in ([1, 2], [[1, 0], [2]]):
        complaint = refusal(load_grid, grid_file(tmp_path, experiments={"A": {}}, sweep={"seed, data_seed": wrong}))
        assert "'sweep' of 'seed, data_seed' needs lists of 2 values each" in complaint


def test_a_grid_without_a_sweep_has_one_run_for_each_experiment(tmp_path):
    grid = load_grid(grid_file(tmp_path, experiments={"A": {}, "B": {"num_layers": 3}}))
    assert {name: run.num_layers for name, run in grid.runs.items()} == {"A": 6, "B": 3}


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(1, 10**6), min_size=2, max_size=6, unique=True), data=st.data())
def test_a_longer_sweep_adds_runs_and_changes_none(tmp_path_factory, sizes, data):
    folder = tmp_path_factory.mktemp("grid")
    shorter = data.draw(st.lists(st.sampled_from(sizes), min_size=1, unique=True))
    before = load_grid(grid_file(folder, sweep={"train_tokens": shorter, "seed": [1, 2]})).runs
    after = load_grid(grid_file(folder, sweep={"train_tokens": sizes, "seed": [1, 2]})).runs
    assert len(before) == 2 * len(shorter) and len(after) == 2 * len(sizes)
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({"swep": {}}, "'swep' is no key of a grid file"),
        ({1: 2, "x": 3}, "is no key of a grid file"),
        ({"experiments": {}}, "experiments = {} is not possible: it must map"),
        ({"experiments": None}, "experiments = {} is not possible: it must map"),
        ({"experiments": ["A", "B"]}, "experiments = ['A', 'B'] is not possible: it must map"),
        (
            {"experiments": {"A": [1]}},
            "experiments, A = 1 is not possible: it must map at least one label to a parameter",
        ),
        ({"experiments": {"a b": {}}}, "run a b: experiment = 'a b'"),
        ({"common": 5}, "common = 5 is not possible: it must be a parameter file, values, or a list of such"),
        ({"common": {"num_layer": 3}}, "run A: num_layer = 3 is not a parameter: did you mean num_layers?"),
        ({"sweep": {"seed": 3}}, "sweep, seed = 3 is not possible: it must map parameter names to non-empty lists"),
        ({"sweep": {"seed": []}}, "sweep, seed = [] is not possible: it must map parameter names to non-empty lists"),
        ({"sweep": [1]}, "sweep = [1] is not possible: it must map parameter names to non-empty lists"),
        ({"sweep": {"sed": [1]}}, "run A_sed-1: sed = 1 is not a parameter: did you mean seed?"),
        ({"sweep": {"seed": [1, "2"]}}, "run A_seed-2: seed = '2'"),
        ({"sweep": {"seed": [1, 2], "seed, data_seed": [[1, 0]]}}, "'sweep' names seed twice: keep one of the two"),
        ({"sweep": {"seed, seed": [[1, 2]]}}, "'sweep' names seed twice"),
        ({"sweep": {"seed": [42, 43, 42]}}, "'sweep' of 'seed' has 42 twice: remove one of the two"),
        ({"sweep": {"phase1_learning_rate": [1, 1.0]}}, "has 1.0 twice"),
        ({"sweep": {"seed, data_seed": [[1, 0], [1, 0]]}}, "has [1, 0] twice"),
        (
            {"experiments": {"A": {"seed": 7}}, "sweep": {"seed": [1, 2]}},
            "seed = 7 of experiment 'A' would be overridden by 'sweep': remove one of the two",
        ),
        ({"sweep": {"train_samples": [50]}}, "give exactly one"),
        ({"sweep": {"corpus": ["texts/mine.txt"]}}, "cannot name a folder"),
        ({"sweep": {"corpus": ["a" * 200 + ".txt"]}}, "its name has 213 characters, more than 200: shorten its label"),
        ({"title": 7}, "title = 7"),
        ({"title": None}, "title = None is not possible: write a text after it"),
        ({"description": None}, "description = None is not possible: write a text after it"),
    ],
)
def test_a_grid_file_that_cannot_be_used_is_named_with_the_reason(tmp_path, content, complaint):
    file = grid_file(tmp_path)
    written = yaml.safe_load(Path(file).read_text(encoding="utf-8")) | content
    Path(file).write_text(yaml.safe_dump(written, sort_keys=False), encoding="utf-8")
    message = refusal(load_grid, file)
    assert message.startswith(file) and complaint in message


def test_a_grids_parameter_file_that_is_missing_is_named(tmp_path):
    missing = "params/C.yaml cannot be read (No such file or directory): check the name"
    file = grid_file(tmp_path, experiments={"A": "params/C.yaml"})
    assert refusal(load_grid, file) == f"{file}, experiment A: {missing}"
    assert refusal(load_grid, grid_file(tmp_path, common="params/C.yaml")) == f"{file}: {missing}"


def test_a_fault_of_a_later_experiment_is_not_laid_to_an_earlier_one(tmp_path):
    file = grid_file(tmp_path, experiments={"A": {}, "B": "params/C.yaml"})
    message = refusal(load_grid, file)
    assert message.startswith(file) and "params/C.yaml cannot be read" in message and "run A" not in message
    assert f"{file}, run B: num_layers = 0" in refusal(
        load_grid, grid_file(tmp_path, experiments={"A": {}, "B": {"num_layers": 0}})
    )


def test_a_missing_grid_is_answered_with_the_known_ones():
    message = refusal(load_grid, "quikc")
    assert "'quikc'" in message and all(name in message for name in GRIDS)
    assert "missing.yaml" in refusal(load_grid, "params/grids/missing.yaml")
    assert "grid = '' names no grid: choose one of ablations, " in refusal(load_grid, "")


@pytest.mark.parametrize("name", GRIDS)
def test_every_grid_of_the_repository_loads(name):
    grid = load_grid(name)
    assert grid.name == name and grid.title and grid.description
    assert len({run.params_hash for run in grid.runs.values()}) == len(grid.runs) > 0


def test_the_quick_grid_keeps_the_studys_proportions():
    runs = load_grid("quick").runs.values()
    assert {run.experiment for run in runs} == {"A", "B"}
    for label, layers, ratio in (("A", 6, 1), ("B", 3, 2)):
        own = [run for run in runs if run.experiment == label]
        assert {(run.num_layers, run.context_dim / run.embed_dim) for run in own} == {(layers, ratio)}
        assert {run.embed_dim for run in own} == {own[0].embed_dim} and own[0].embed_dim >= 128
        assert {run.train_tokens for run in own} == {8_000, 16_000}
        judged = {(run.val_samples, run.development_samples, run.test_samples, run.max_sample_tokens) for run in own}
        assert judged == {(100, 100, 200, 128)}
        assert {run.corpus for run in own} == {"chitchat"}
    by_label = [{(run.train_tokens, run.seed) for run in runs if run.experiment == label} for label in "AB"]
    assert by_label[0] == by_label[1]


def test_the_quick_grid_changes_only_widths_and_sizes_and_is_sound():
    free = {"output_bias", "phase2_init_std", "logit_scale"}
    assert read_yaml("params/sound.yaml").keys() == free
    free |= {"experiment", "num_layers", "context_dim", "embed_dim"}
    free |= {
        "train_tokens",
        "val_samples",
        "development_samples",
        "test_samples",
        "max_sample_tokens",
        "seed",
        "data_seed",
        "embedding_seed",
    }
    for run in load_grid("quick").runs.values():
        assert run.model_dump(exclude=free) == Experiment().model_dump(exclude=free)
        assert run.val_samples != Experiment().val_samples
        assert is_sound(run)


def is_sound(run):
    return (run.output_bias, run.phase2_init_std) == ("unigram", 0.01) and (
        run.logit_scale == pytest.approx(math.sqrt(32 / run.embed_dim), rel=0.03)
    )


def test_logits_of_every_sound_run_spread_alike():
    sound = [name for name in GRIDS if "sound" in name or name in ("depth", "depth-full", "designs", "sizes", "quick")]
    mixed = [run for name in ("chance", "signs", "rank", "random", "dtype") for run in load_grid(name).runs.values()]
    runs = [run for name in sound for run in load_grid(name).runs.values()]
    runs += [run for run in mixed if run.experiment.startswith("sound-")]
    assert len(runs) > 200 and all(is_sound(run) for run in runs)


def test_the_study_grid_is_the_study_in_five_replicates():
    shapes = {"A": {"num_layers": 6, "context_dim": 768}, "B": {"num_layers": 3, "context_dim": 1536}}
    expected = [
        Experiment.from_mapping({"experiment": label, "train_tokens": size}, shape)
        for label, shape in shapes.items()
        for size in (86_925, 183_620)
    ]
    runs = list(load_grid("study").runs.values())
    drawn = {"seed", "data_seed", "embedding_seed"}
    known = [run.model_dump(exclude=drawn) for run in expected]
    assert len(runs) == 5 * len(known) and all(run.model_dump(exclude=drawn) in known for run in runs)
    assert len({(run.seed, run.data_seed, run.embedding_seed) for run in runs}) == 5
    assert all((run.corpus, run.embed_dim) == ("chitchat", 768) for run in runs)
