"""`Experiment`: every parameter of one run, under the study's own names, checked before any work starts.

A grid file names several experiments and the values to sweep; `load_grid` expands it into runs.
"""

import ast
import difflib
import inspect
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from ctxlm.files import BY_HAND, ROOT, resolve, source_hash

Count = Annotated[int, Field(ge=1, le=10**9)]
Natural = Annotated[int, Field(ge=0, le=10**9)]
Width = Annotated[int, Field(ge=2, le=65_536)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, le=1e30)]

CORPORA = ("chitchat", "sotu", "docstrings", "prompts", "ultrachat")
"""Corpora that have a name."""
CORPUS = r"^(({0})(\+({0}))*|[^\p{{Cc}}]+\.(?i:txt|jsonl|parquet))$".format("|".join(CORPORA))
MODULES = {"context": ("phase1", "phase2", "memory"), "kneser-ney": ("ngrams",)}
MODULES |= dict.fromkeys(("lstm", "mingru", "transformer"), ("networks",))
"""The modules of `ctxlm` that a run of each `model` enters by; what these import belongs to it too."""
NOTEBOOKS = dict.fromkeys(MODULES, "notebooks/03_baseline.ipynb") | {"context": "notebooks/02_experiment.ipynb"}
"""What runs each `model`."""
BASELINES_ALONE = {"ngram_order", "ngram_second_half", "hidden_dim", "window", "num_heads"}
"""Parameters that the context model does not read."""
CONTEXT_ALONE = {
    *("design", "context_dim", "num_input_tokens", "phase1_init_std", "dist_reg_weight", "phase1_learning_rate"),
    *("phase1_batch_size", "phase1_min_iterations", "phase1_max_iterations", "phase1_convergence_threshold"),
    *("phase1_min_converged_ratio", "phase1_context_noise", "phase1_gradient_clip", "phase2_context_window"),
    *("phase2_init_std", "phase2_shuffle", "context_ablation", "context_rank"),
    *("spectral_radius", "leak", "input_scale"),
}
"""Parameters that no other model reads."""
DATA_PARAMETERS = {
    *("corpus", "judged_corpus", "shuffle_samples", "embedding", "embed_dim", "train_sample_tokens"),
    *("train_piece_tokens", "val_samples", "development_samples", "test_samples", "max_sample_tokens"),
}
"""Parameters of what is read and judged, size and replicate apart."""
RESERVED = ("site", "search", "reproduce", "benchmark", "single", BY_HAND)
"""Folders of `outputs` that are no grid's."""
NAME = r"[A-Za-z0-9][A-Za-z0-9_.+-]*"
"""What a run or a grid may be called, since it names a folder."""
MAX_NAME = 200
"""Characters of a run's name, since file systems take 255 bytes."""


class ConfigError(ValueError):
    """Input that cannot be used; the message names the parameter, its value and the remedy."""

    def _render_traceback_(self) -> list[str]:
        """What Jupyter shows: the sentence, not the way to it."""
        return [f"{type(self).__name__}: {self}"]


class Checked(BaseModel):
    """A model that says what is wrong with its values in a `ConfigError`, one line, in pydantic's own words."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def __init__(self, /, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as error:
            sentences = dict.fromkeys(_sentence(type(self), detail) for detail in error.errors())
            raise ConfigError("; ".join(sentences)) from None


class Experiment(Checked):
    """One run, of the two-phase context language model or another; by default as the study's (`params/base.yaml`)."""

    experiment: str = Field(
        "A",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        max_length=60,
        description="label: letters, digits, dots, hyphens, underscores",
    )
    # What is read
    corpus: str = Field(
        "chitchat",
        pattern=CORPUS,
        description="chitchat, sotu, docstrings, prompts or ultrachat, several of them in turn (chitchat+sotu), or a "
        ".txt, .jsonl or .parquet file",
    )
    judged_corpus: str | None = Field(None, pattern=CORPUS, description="another corpus to judge on")
    shuffle_samples: bool = Field(False, description="samples in one random order, always the same")
    embedding: str = Field(
        "ppmi",
        pattern=r"^(ppmi|ppmi-train|smollm2|random|gpt2|[^\p{Cc}]+\.safetensors)$",
        description="ppmi, ppmi-train, smollm2, random, gpt2, or a .safetensors file with a tensor wte",
    )
    embedding_rows: Literal["given", "centred", "unit"] = Field(
        "given", description="its rows: as they are, less their mean, or all of one length"
    )
    embedding_seed: Seed = Field(0, description="draws its dimensions' signs, or random's numbers; 0: signs stay")
    embedding_turned: Natural | None = Field(None, description="number of a dimension whose sign is turned")
    train_tokens: Count = Field(86_925, description="training tokens, exactly")
    train_sample_tokens: Count | None = Field(None, description="tokens read of each training sample; null: all")
    train_piece_tokens: Count | None = Field(
        None, description="cut training text into pieces of so many tokens, read in random order"
    )
    data_seed: int = Field(0, ge=0, lt=60, description="where training text begins, in sixtieths of what there is")
    val_samples: Count = Field(200, description="validation samples, which choose the epoch")
    development_samples: Count = Field(200, description="development samples, which choose settings")
    test_samples: Count = Field(200, description="test samples, which choose nothing")
    max_sample_tokens: Count | None = Field(256, description="tokens read of each judged sample; null: all")
    held_out_tokens: Natural = Field(0, description="last training tokens, kept as validation to choose settings")
    # The model
    model: Literal[*MODULES] = Field("context", description="the two-phase model, or another beside it")
    design: Literal["constant", "arithmetic", "echo"] = Field(
        "constant", description="layers of one width, of falling widths, or an untrained echo state network"
    )
    num_layers: int = Field(6, ge=1, le=1024, description="layers of each block, L")
    context_dim: Width = Field(768, description="width of the context, C")
    embed_dim: Width = Field(768, description="width of a token embedding, d")
    num_input_tokens: int = Field(2, ge=1, le=64, description="tokens read at a time, n")
    spectral_radius: Positive = Field(0.9, description="of an echo state network's recurrent weights")
    leak: float = Field(1.0, gt=0, le=1, description="share of an echo state network's context that a token replaces")
    input_scale: Positive = Field(1.0, description="standard deviation of what an echo state network reads of a token")
    # Phase 1
    phase1_init_std: Positive = Field(
        0.1, description="standard deviation of the ContextBlock's initial weights; of biases a tenth"
    )
    dist_reg_weight: Fraction = Field(0.5, description="weight of diversity in the loss")
    phase1_learning_rate: Positive = Field(0.002, description="Adam's learning rate")
    phase1_batch_size: Count = Field(4096, description="tokens of a block; a step is of all blocks")
    phase1_min_iterations: Count = Field(3, description="iterations at least")
    phase1_max_iterations: Count = Field(10, description="iterations at most")
    phase1_convergence_threshold: Positive = Field(
        0.03, description="a context has converged if its mean squared change is less"
    )
    phase1_min_converged_ratio: Fraction = Field(0.95, description="share of converged tokens that ends it")
    phase1_context_noise: float = Field(0.1, ge=0, le=1e30, description="standard deviation of noise on contexts")
    phase1_gradient_clip: Positive = Field(1.0, description="largest gradient norm")
    # Phase 2
    phase2_learning_rate: Positive = Field(0.002, description="Adam's learning rate")
    phase2_batch_size: Count = Field(512, description="tokens per update, consecutive unless phase2_shuffle")
    phase2_epochs: Count = Field(10, description="epochs at most")
    phase2_patience: Count = Field(2, description="epochs without a better validation loss before stopping")
    phase2_gradient_clip: Positive = Field(1.0, description="largest gradient norm")
    phase2_freeze_embedding: bool = Field(True, description="keep the embedding fixed")
    # What the study does not have, off by default
    validations_per_epoch: int = Field(1, ge=1, le=100, description="validations an epoch")
    dropout: Share = Field(0.0, description="share of new activations, of TokenBlock or network, set to zero")
    weight_decay: float = Field(0.0, ge=0, le=100, description="decoupled weight decay of all matrices")
    output_bias: Literal["none", "unigram"] = Field("none", description="unigram: trained, at first log (counts + 1)")
    phase2_init_std: Positive = Field(0.1, description="as phase1_init_std, of the TokenBlock")
    logit_scale: Positive | None = Field(
        1.0, description="factor of the logits before the bias; null: √(32 / embed_dim)"
    )
    phase2_context_window: Natural = Field(
        0, description="tokens that the ContextBlock is trained through; 0: not trained"
    )
    phase2_shuffle: bool = Field(False, description="read in random order, anew every epoch")
    # Other models
    ngram_order: int = Field(4, ge=1, le=64, description="longest n-gram of kneser-ney, in tokens")
    ngram_second_half: bool = Field(False, description="kneser-ney counts the text that ppmi has read, too")
    hidden_dim: Width = Field(1712, description="width of the lstm's or mingru's state, or of the transformer's layers")
    window: Count = Field(32, description="tokens an lstm or mingru is trained through, or a transformer sees at most")
    num_heads: Count = Field(8, description="attention heads of a layer of the transformer")
    # Looking into it
    context_ablation: Literal["none", "zero", "random_tokens"] = Field(
        "none", description="replace contexts by zeros, or by those of shuffled tokens"
    )
    context_rank: Natural = Field(0, description="principal dimensions of contexts that the TokenBlock reads; 0: all")
    # The machine
    seed: Seed = Field(42, description="draws initial weights, noise and order")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:(0|[1-9]\d?))?)$", description="auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="type of matrix products but the recurrence's; auto: bfloat16 where the machine has it"
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value(cls, value: Any, info: ValidationInfo) -> Any:
        """`weight_decay: true` would else be 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise PydanticCustomError("truth_value", "give a number, a word or null")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "Experiment":
        if self.logit_scale is None:  # at first logits then spread alike at every width
            self.__dict__["logit_scale"] = round(math.sqrt(32 / self.embed_dim), 3)

        def refuse(names: str, remedy: str) -> None:
            values = " and ".join(f"{name} = {getattr(self, name)!r}" for name in names.split())
            raise ValueError(f"{values}: {remedy}")

        if self.embedding_turned is not None and self.embedding_turned >= self.embed_dim:
            refuse("embedding_turned embed_dim", "the embedding has no such dimension")
        if self.embedding == "gpt2" and self.embed_dim != 768:
            refuse("embedding embed_dim", "GPT-2's has 768 dimensions")
        if self.embedding == "smollm2" and self.embed_dim > 576:
            refuse("embedding embed_dim", "SmolLM2's has 576 dimensions, of which fewer can be kept")
        both = {*self.corpus.split("+")} & {*(self.judged_corpus or "").split("+")} & {*CORPORA}
        if both or self.corpus == self.judged_corpus:
            refuse("corpus judged_corpus", "text of the first would be judged on: name another, or null")
        if self.ngram_second_half and self.model != "kneser-ney":
            refuse("ngram_second_half model", "only kneser-ney counts")
        if self.model == "transformer" and self.hidden_dim % self.num_heads:
            refuse("hidden_dim num_heads", "the first must be a multiple of the second")
        window = "phase2_context_window" if self.model == "context" else "window"
        if self.model != "kneser-ney" and getattr(self, window) and self.phase2_batch_size % getattr(self, window):
            refuse(f"phase2_batch_size {window}", "the first must be a multiple of the second")
        if self.held_out_tokens and not 2 <= self.held_out_tokens <= self.train_tokens - 2:
            refuse("held_out_tokens train_tokens", "the first must hold, and leave, two or more (0: none)")
        updates = max(1, math.ceil((self.train_tokens - self.held_out_tokens - 1) / self.phase2_batch_size))
        if self.validations_per_epoch > updates:
            refuse("validations_per_epoch phase2_batch_size", f"an epoch has fewer updates, {updates}: lower one")
        if self.context_ablation != "none" and (self.phase2_context_window or self.context_rank):
            refuse("context_ablation phase2_context_window context_rank", "the first replaces the contexts")
        if self.phase2_shuffle and self.phase2_context_window:
            refuse("phase2_shuffle phase2_context_window", "the second trains through consecutive tokens: set it to 0")
        if self.context_rank and self.phase2_context_window:
            refuse("context_rank phase2_context_window", "the first keeps part of contexts that stay: set one to 0")
        for name in ("spectral_radius", "leak", "input_scale"):
            if self.design != "echo" and getattr(self, name) != type(self).model_fields[name].default:
                refuse(f"{name} design", "only echo reads the first")
        if self.design == "echo" and (self.phase1_max_iterations > 1 or self.phase2_context_window):
            refuse("design phase1_max_iterations phase2_context_window", "the first trains no contexts: set 1 and 0")
        if self.context_rank > self.context_dim:
            refuse("context_rank context_dim", "a context has no more dimensions")
        return self

    @classmethod
    def from_mapping(cls, *layers: Mapping[str, Any]) -> "Experiment":
        """An experiment from parameter mappings, later ones overriding earlier ones.

        Raises:
            ConfigError: an unknown name, a wrong type, a value out of bounds; all in one line.
        """
        return cls(**{str(name): value for layer in layers for name, value in layer.items()})

    @classmethod
    def of_run(cls, run: Mapping[str, Any]) -> "Experiment":
        """The experiment of a finished run, its metrics.json or a row, for this machine's CPU in float32.

        Raises:
            ConfigError: as `from_mapping`.
        """
        given = {name: run[name] for name in cls.model_fields if name in run}
        given = {name: None if value != value else value for name, value in given.items()}  # a row has nan for null
        return cls.from_mapping(given, {"device": "cpu", "dtype": "float32"})

    @classmethod
    def from_namespace(
        cls, namespace: Mapping[str, Any], notebook: str | None = None, also: Iterable[str] = ("output_dir",)
    ) -> "Experiment":
        """The experiment of a notebook's `globals()`, called before the notebook defines anything but parameters.

        papermill only warns about a parameter that it does not know, and injects it all the same: here it is refused.

        Args:
            notebook: its path in the repository, if it is one that runs a model.
            also: its parameters that are none of an experiment.

        Raises:
            ConfigError: as `from_mapping`; or another notebook is its model's.
        """
        names = _parameters_given(namespace) - {*also}
        e = cls.from_mapping({name: namespace[name] for name in names | (cls.model_fields.keys() & namespace)})
        if notebook and NOTEBOOKS[e.model] != notebook:
            raise ConfigError(f"model = {e.model!r} is run by {NOTEBOOKS[e.model]}, not by this notebook")
        if notebook:
            e.check_read(names)
        return e

    def check_read(self, names: Iterable[str]) -> None:
        """Refuse, by a ConfigError, parameters that were given by name and that the model's notebook has not."""
        if unread := sorted({*names} - self.for_notebook().keys()):
            value = getattr(self, unread[0], None)
            raise ConfigError(f"{unread[0]} = {value!r}: model = {self.model!r} does not read it: leave it out")

    def for_notebook(self) -> dict[str, Any]:
        """The parameters of the notebook that runs its model: name → value."""
        return self.model_dump(exclude=BASELINES_ALONE if self.model == "context" else CONTEXT_ALONE)

    def is_that_of(self, run: Mapping[str, Any]) -> bool:
        """Whether a finished run, its metrics.json or a row, has these parameters, as far as its model reads them."""
        for name, value in self.for_notebook().items():
            other = run.get(name, type(self).model_fields[name].default)  # of a run that is older than the parameter
            other = None if other != other else other  # a row has nan for null
            chosen = value == "auto" and name in ("device", "dtype")  # of which a run holds what it became
            if other != value and not chosen:
                return False
        return True


def code_hash(model: str = "context") -> str:
    """Digest of the code that a run's numbers depend on: its model's modules and the notebook that runs it."""
    return source_hash(*(f"ctxlm/{name}.py" for name in MODULES[model]), NOTEBOOKS[model])


def _parameters_given(namespace: Mapping[str, Any]) -> set[str]:
    """Names that a notebook's parameters' cell, as it was run last, and the one that papermill put behind it assign."""
    ours, papermills = set(), set()
    for cell in namespace.get("In", []):
        names = _assigned(cell)
        if cell.startswith("# Parameters"):
            papermills = names
        elif {"corpus", "output_dir"} <= names:
            ours, papermills = names, set()
    return (ours | papermills) & namespace.keys()


def _assigned(cell: str) -> set[str]:
    """Names that a cell assigns; none where it is no Python."""
    try:
        nodes = ast.walk(ast.parse(cell))
    except SyntaxError:
        return set()
    return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def _sentence(kind: type[BaseModel], detail: Mapping[str, Any]) -> str:
    """One of pydantic's error details in a line: parameter, value, what is wrong."""
    if not detail["loc"]:  # raised by a validator of the whole, a sentence already
        return str(detail["ctx"]["error"])
    name, value = ".".join(map(str, detail["loc"][:2])), repr(detail["input"])
    if detail["type"] == "missing":
        return f"{name} is missing"
    value = value if len(value) <= 200 else f"{value[:120]} … {value[-40:]}"
    if detail["type"] != "extra_forbidden":
        field = kind.model_fields.get(name)  # a pattern is no remedy, what it stands for is
        return f"{name} = {value}: {field.description if 'pattern' in detail['type'] and field else detail['msg']}"
    close = difflib.get_close_matches(name, kind.model_fields)
    return f"{name} = {value} is unknown: {f'did you mean {close[0]}?' if close else 'see docs/parameters.md'}"


class _Loader(yaml.SafeLoader):
    """Refuses a name that is given twice, of which YAML's own takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        if twice := {str(name) for name in names if names.count(name) > 1}:
            raise ValueError(f"{min(twice)} is given twice")
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; relative paths are taken from the repository's root.

    Raises:
        ConfigError: the file cannot be read, or holds no mapping.
    """
    try:
        content = yaml.load(resolve(path).read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path} is not there: check the name") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason, mark = " ".join(str(error).split()), getattr(error, "problem_mark", None)
        reason = f"line {mark.line + 1}: {error.problem}" if mark else reason
        raise ConfigError(f"{path} cannot be read as YAML ({reason}): check it") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold `name: value` lines, but holds {type(content).__name__}")
    return {str(name): value for name, value in content.items()}


Layers = Annotated[
    list[str | dict[str, Any]], BeforeValidator(lambda given: given if isinstance(given, list) else [given or {}])
]
"""A parameter file, values, or a list of such, of which later ones win; as a list."""


def read_layers(layers: Layers) -> list[dict[str, Any]]:
    """The values of each layer, files read."""
    return [read_yaml(layer) if isinstance(layer, str) else layer for layer in layers]


class GridFile(Checked):
    """What a file in `params/grids/` holds."""

    title: str
    description: str = ""
    common: Layers = []
    experiments: dict[str, Layers] = Field(min_length=1)
    sweep: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}


class Grid(BaseModel):
    """A grid file's experiments crossed with its swept values: `runs` maps each run's name to its experiment."""

    name: str
    title: str
    description: str
    runs: dict[str, Experiment]


def load_grid(name: str) -> Grid:
    """Expand `params/grids/<name>.yaml` (or the file `name`) into runs, every one checked.

    The file holds `title`, `description`, `common` (over `params/base.yaml`), `experiments` (by label) and `sweep`
    (parameter → list, or several parameters, as "seed, data_seed" → list of lists, that change together). A run is
    called after its label and every swept value, so a longer list adds runs and renames none.

    Raises:
        ConfigError: as `read_yaml` and `Experiment.from_mapping`, naming the run.
    """
    path, runs = _grid_file(name), {}
    where = str(path)
    try:
        file = GridFile(**{"title": path.stem} | read_yaml(path))
        common = [read_yaml("params/base.yaml"), *read_layers(file.common)]
        steps = list(sweep(file.sweep))
        for label, given in file.experiments.items():
            where = f"{path}, experiment {label}"
            layers = read_layers(given)
            written = {name for layer in given if isinstance(layer, dict) for name in layer}  # files: defaults
            for step in steps:
                run = "_".join([label, *(f"{key}-{value}" for key, value in step.items())])
                where = f"{path}, run {run}"
                _check_name(run, runs)
                if both := written & step.keys():
                    raise ConfigError(f"'sweep' would override {', '.join(both)} of the experiment: leave one out")
                runs[run] = Experiment.from_mapping(*common, *layers, {"experiment": label}, step)
                runs[run].check_read({*step, *written})
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return Grid(name=path.stem, title=file.title, description=file.description, runs=runs)


def sweep(lines: Mapping[str, Iterable[Any]]) -> Iterator[dict[str, Any]]:
    """Every combination of the values of a sweep, or of a search's space: parameter → value."""
    for combination in itertools.product(*lines.values()):
        step: dict[str, Any] = {}
        for line, value in zip(lines, combination, strict=True):
            names = [name.strip() for name in line.split(",")]
            values = value if len(names) > 1 else [value]
            if not isinstance(values, list) or len(values) != len(names):
                raise ConfigError(f"'{line}' needs lists of {len(names)} values each, as [42, 0]")
            if twice := step.keys() & {*names}:
                raise ConfigError(f"{min(twice)} stands in two lines: give its values in one")
            step |= dict(zip(names, values, strict=True))
        yield step


def _grid_file(name: str) -> Path:
    path = Path(name) if name.endswith((".yaml", ".yml")) else Path("params/grids") / f"{name}.yaml"
    ours = ROOT / "params" / "grids"
    if not resolve(path).exists():
        close = difflib.get_close_matches(name, [file.stem for file in ours.glob("*.yaml")])
        remedy = f"did you mean {close[0]}?" if close else "choose one of docs/grids.md, or name a .yaml file"
        raise ConfigError(f"grid {name!r} does not exist: {remedy}")
    namesake = ours / f"{path.stem}.yaml"
    if namesake.exists() and not resolve(path).samefile(namesake):
        raise ConfigError(f"{path}: outputs/{path.stem} belongs to params/grids/{path.stem}.yaml: rename your file")
    if path.stem in RESERVED or not re.fullmatch(NAME, path.stem):
        raise ConfigError(f"{path}: {path.stem!r} cannot name its folder in outputs: rename your file")
    return path


def _check_name(run: str, others: Mapping[str, Experiment]) -> None:
    """Refuse a run's name that cannot be its folder's."""
    if run == "report" or run.startswith("corpus"):
        raise ConfigError("the report and the corpus are called so: rename it")
    if not re.fullmatch(NAME, run) or len(run) > MAX_NAME:  # a path among the swept values, say
        raise ConfigError(
            f"a run's name is its folder's: at most {MAX_NAME} letters, digits and _.+-; give a path, say, under "
            "'experiments', among a label's values"
        )
    if run in others:
        raise ConfigError("a value of 'sweep' is given twice: leave one out")


def parameters_list() -> str:
    """`docs/parameters.md`, under the comments of `Experiment`: `make docs` writes it, and a test holds it."""
    page = "# Parameters\n\nName (default; other values): meaning. To papermill null is `None`.\n\n"
    for comment, name in re.findall(r"^    (?:# (.+)|(\w+): )", inspect.getsource(Experiment), re.MULTILINE):
        if comment:
            page += f"\n## {comment}\n\n"
        elif field := Experiment.model_fields.get(name):
            others = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
            values = [json.dumps(field.default).strip('"'), ", ".join(o for o in others if o != field.default)]
            page += f"- `{name}` ({'; '.join(filter(None, values))}): {field.description}\n"
    return page


if __name__ == "__main__":
    (ROOT / "docs" / "parameters.md").write_text(parameters_list(), encoding="utf-8")
