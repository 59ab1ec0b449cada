"""`Experiment`: every parameter of one run, under the study's own names, checked before any work starts.

A grid file names several experiments and the values to sweep; `load_grid` expands it into runs.
"""

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ctxlm.files import ROOT, digest, resolve, source_hash

Count = Annotated[int, Field(ge=1)]
Width = Annotated[int, Field(ge=1, le=65_536)]
Few = Annotated[int, Field(ge=1, le=64)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]

BASELINES = ("kneser-ney", "lstm", "transformer")
"""Values of `model` that are what a user would otherwise pick."""
NOTEBOOKS = {"context": "notebooks/02_experiment.ipynb"} | dict.fromkeys(BASELINES, "notebooks/06_baseline.ipynb")
"""What runs each `model`."""
SOURCES = tuple(sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "ctxlm").glob("*.py")))
"""What a run's numbers depend on beside its notebook; the analysis is left out on purpose."""

NAME = r"[A-Za-z0-9][A-Za-z0-9_.+-]*"
"""What a run or a grid may be called, since it names a folder."""
LONGEST_NAME = 200
"""Characters of a run's name; file systems take 255 bytes."""


def code_hash(model: str = "context") -> str:
    """Digest of `SOURCES` and the notebook that runs `model`."""
    return source_hash(*SOURCES, NOTEBOOKS[model])


class ConfigError(ValueError):
    """A parameter that cannot be used; the message names it, its value and the remedy in one sentence."""


class Experiment(BaseModel):
    """One run, of the two-phase context language model or another; by default as the study's (`params/base.yaml`)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    experiment: str = Field(
        "A", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=60, description="label of the configuration"
    )
    # What is read
    corpus: str = Field("chitchat", min_length=1, description="chitchat, ultrachat, or a .txt, .jsonl or .parquet file")
    embedding: str = Field("ppmi", min_length=1, description="ppmi, random, gpt2, or a .safetensors file holding wte")
    embedding_seed: Seed = Field(
        0, description="0: ppmi as it is, its signs by a convention; otherwise they, or random's numbers, are drawn"
    )
    train_tokens: Count | None = Field(86_925, description="training tokens, cut exactly (or give train_samples)")
    train_samples: Count | None = Field(None, description="training samples, whole (or give train_tokens)")
    val_samples: Count = Field(50, description="validation samples: the first after the training capacity")
    test_samples: Count = Field(50, description="test samples: the first after validation")
    train_capacity_tokens: Count | None = Field(None, description="tokens kept for training; null: the corpus's own")
    train_capacity_samples: Count | None = Field(None, description="samples kept for training; null: the corpus's own")
    data_seed: Seed = Field(0, description="0: the first samples; otherwise the training window starts elsewhere")
    # The model
    model: Literal["context", "kneser-ney", "lstm", "transformer"] = Field(
        "context", description="the two-phase context language model, or another to set beside it"
    )
    ngram_order: Few = Field(4, description="tokens that an n-gram of kneser-ney spans")
    ngram_second_half: bool = Field(
        False, description="kneser-ney counts the corpus's second half too, which the ppmi embedding has read"
    )
    hidden_dim: Width = Field(1712, description="width of the lstm's state, or of the transformer's layers")
    window: Count = Field(32, description="tokens an lstm is trained through at a time, or a transformer sees at most")
    num_heads: Count = Field(8, description="attention heads of a layer of the transformer")
    design: Literal["constant", "arithmetic"] = Field(
        "constant", description="width of the layers: constant, or falling in an arithmetic progression"
    )
    num_layers: int = Field(6, ge=1, le=1024, description="layers of each block, L")
    context_dim: int = Field(768, ge=2, le=65_536, description="width of the context, C")
    embed_dim: Width = Field(768, description="width of a token embedding, d")
    num_input_tokens: Few = Field(2, description="tokens read at a time, n")
    use_weight_tying: bool = Field(True, description="the head is the embedding matrix")
    # Phase 1
    phase1_init_std: Positive = Field(0.1, description="sd of the ContextBlock's initial weights (of biases a tenth)")
    dist_reg_weight: Fraction = Field(0.5, description="weight of diversity in Phase 1's loss")
    phase1_learning_rate: Positive = Field(0.002, description="Adam's learning rate in Phase 1")
    phase1_batch_size: Count = Field(4096, description="tokens per accumulated block")
    phase1_min_iterations: Count = Field(3, description="no early stop before this iteration")
    phase1_max_iterations: Count = Field(10, description="Phase 1 ends here at the latest")
    phase1_convergence_threshold: Positive = Field(0.03, description="a token whose context moved less has converged")
    phase1_min_converged_ratio: Fraction = Field(0.95, description="share of converged tokens that stops Phase 1")
    phase1_context_noise: float = Field(0.1, ge=0, description="sd of the noise on contexts read")
    phase1_gradient_clip: Positive = Field(1.0, description="largest gradient norm in Phase 1")
    # Phase 2
    phase2_learning_rate: Positive = Field(0.002, description="Adam's learning rate in Phase 2")
    phase2_batch_size: Count = Field(512, description="tokens per update, consecutive unless shuffled")
    phase2_epochs: Count = Field(10, description="Phase 2 ends here at the latest")
    phase2_patience: Count = Field(2, description="epochs without a better validation loss before stopping")
    phase2_gradient_clip: Positive = Field(1.0, description="largest gradient norm in Phase 2")
    phase2_freeze_embedding: bool = Field(True, description="keep the embedding fixed in Phase 2")
    # Phase 2: what the study does not have; all of it is off by default
    output_bias: Literal["none", "unigram"] = Field(
        "none", description="a trained bias of the output that starts at the training tokens' log frequencies (unigram)"
    )
    phase2_context_window: int = Field(
        0, ge=0, description="tokens that Phase 2 trains the ContextBlock through at a time; 0: it stays as it is"
    )
    slow_decay: Share = Field(
        0.0, description="decay a token of a slow context, a decayed sum of embeddings that the head reads too; 0: none"
    )
    phase2_init_std: Positive = Field(0.1, description="sd of the TokenBlock's initial weights (of biases a tenth)")
    logit_scale: Positive = Field(1.0, description="factor of the logits, bias apart")
    phase2_shuffle: bool = Field(
        False, description="updates read tokens (or whole windows of them) in random order, not the stream's"
    )
    phase2_warmup_updates: int = Field(0, ge=0, description="updates over which the learning rate rises from 0")
    phase2_final_rate: float = Field(
        1.0, gt=0, le=1, description="the learning rate after phase2_epochs as a share of its peak (half a cosine)"
    )
    phase2_weight_decay: float = Field(0.0, ge=0, description="AdamW's, decoupled")
    phase2_dropout: Share = Field(0.0, description="share of context and input entries dropped in training")
    phase2_token_dropout: Share = Field(
        0.0, description="share of input tokens (but for the ContextBlock's) blanked in training"
    )
    phase2_label_smoothing: Share = Field(0.0, description="share of the target spread over all tokens")
    phase2_weight_average: Share = Field(
        0.0, description="decay an update of the average of the weights that is judged and kept; 0: none"
    )
    held_out_tokens: int = Field(
        0, ge=0, description="for tuning: so many last training tokens are left out, and stand in for validation"
    )
    context_ablation: Literal["none", "zero", "random_tokens"] = Field(
        "none", description="what the TokenBlock reads: its contexts (none), zeros, or contexts of shuffled tokens"
    )
    train_loss_after_epoch: bool = Field(False, description="measure the training loss also after every epoch")
    val_every_steps: int = Field(0, ge=0, description="validate also every so many updates; 0: after epochs only")
    # The machine
    seed: Seed = Field(42, description="of initialisation and noise")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="of the matrix products in both phases")

    @model_validator(mode="after")
    def _consistent(self) -> "Experiment":
        if (self.train_tokens is None) == (self.train_samples is None):
            raise ValueError(
                f"train_tokens = {self.train_tokens} and train_samples = {self.train_samples}: "
                "give exactly one of the two and set the other to null (on papermill's command line: None)"
            )
        if self.train_capacity_tokens is not None and self.train_capacity_samples is not None:
            raise ValueError(
                f"train_capacity_tokens = {self.train_capacity_tokens} and train_capacity_samples = "
                f"{self.train_capacity_samples}: give at most one of the two"
            )
        if self.ngram_second_half and self.model != "kneser-ney":
            raise ValueError(f"ngram_second_half = True is not possible for model = {self.model!r}: set it to false")
        if self.embedding_seed and self.embedding not in ("ppmi", "random"):
            raise ValueError(
                f"embedding_seed = {self.embedding_seed} is not possible for embedding = {self.embedding!r}, of which "
                "nothing is drawn: set it to 0"
            )
        if self.model in ("lstm", "transformer"):
            self._check_network()
        if self.phase1_min_iterations > self.phase1_max_iterations:
            raise ValueError(
                f"phase1_min_iterations = {self.phase1_min_iterations} is above phase1_max_iterations = "
                f"{self.phase1_max_iterations}: lower the first or raise the second"
            )
        window = self.phase2_context_window if self.model == "context" else 0
        if window and self.phase2_batch_size % window:
            raise ValueError(
                f"phase2_batch_size = {self.phase2_batch_size} is not a multiple of phase2_context_window = {window}, "
                "and a batch holds whole windows: make it one"
            )
        for name in ("phase2_context_window", "slow_decay"):
            if self.model == "context" and getattr(self, name) and self.context_ablation != "none":
                raise ValueError(
                    f"{name} = {getattr(self, name)} trains or adds contexts that context_ablation = "
                    f"{self.context_ablation} does not replace: set one of the two to its default (0, none)"
                )
        targets = (self.train_tokens or 0) - self.held_out_tokens - 1
        if self.model == "context" and targets > 0:  # otherwise only the corpus tells how many updates there are
            self.check_warmup(-(-targets // self.phase2_batch_size))
        return self

    def check_warmup(self, updates: int) -> None:
        """Refuse a warm-up that outlasts a training of so many `updates` an epoch.

        Raises:
            ConfigError: it does.
        """
        if self.phase2_warmup_updates >= self.phase2_epochs * updates:
            raise ConfigError(
                f"phase2_warmup_updates = {self.phase2_warmup_updates} is not over within phase2_epochs = "
                f"{self.phase2_epochs} of {updates} updates each: lower it, or raise phase2_epochs"
            )

    def _check_network(self) -> None:
        if self.model == "transformer" and self.hidden_dim % self.num_heads:
            raise ValueError(
                f"hidden_dim = {self.hidden_dim} does not divide among num_heads = {self.num_heads}: change one of them"
            )
        if self.phase2_batch_size % self.window:
            raise ValueError(
                f"phase2_batch_size = {self.phase2_batch_size} is no multiple of window = {self.window}: change one"
            )
        others = "use_weight_tying phase2_shuffle phase2_context_window phase2_init_std design context_ablation"
        for name in others.split():
            value = type(self).model_fields[name].default
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name} = {getattr(self, name)!r} is not possible for model = {self.model!r}: set it to {value!r}"
                )

    @classmethod
    def from_mapping(cls, *layers: Mapping[str, Any]) -> "Experiment":
        """An experiment from parameter mappings, later ones overriding earlier ones.

        Raises:
            ConfigError: an unknown name, a wrong type, a value out of bounds: one sentence for each, on one line.
        """
        merged: dict[str, Any] = {}
        for layer in layers:
            merged.update({str(name): value for name, value in layer.items()})  # YAML's `on:` and `1:` are no text
        try:
            return cls.model_validate(merged)
        except ValidationError as error:
            raise ConfigError("; ".join(_sentence(detail) for detail in error.errors())) from None

    @classmethod
    def from_namespace(cls, namespace: Mapping[str, Any], also: tuple[str, ...] = ("output_dir",)) -> "Experiment":
        """An experiment from a notebook's `globals()`, called before the notebook defines anything but parameters.

        papermill only warns about a parameter it does not know, and injects it all the same; here every
        plain value in the namespace that is not a parameter (or in `also`) is refused.

        Raises:
            ConfigError: as `from_mapping`.
        """
        plain = (bool, int, float, str, type(None))
        found = {
            name: value
            for name, value in namespace.items()
            if not name.startswith("_") and name not in also and (name in cls.model_fields or type(value) in plain)
        }
        return cls.from_mapping(found)

    def meant_for(self, notebook: str) -> "Experiment":
        """Itself, once it is known that this notebook (its path in the repository) runs its model.

        Raises:
            ConfigError: another one does.
        """
        if NOTEBOOKS[self.model] != notebook:
            raise ConfigError(f"model = {self.model!r} is run by {NOTEBOOKS[self.model]}, not by this notebook")
        return self

    @property
    def params_hash(self) -> str:
        """Digest of every parameter: equal for equal experiments, whatever the order they were written in."""
        return digest(json.dumps(self.model_dump(), sort_keys=True))


_PATTERNS = {
    "experiment": "a label holds letters, digits, '.', '_' and '-' only, and begins with a letter or a digit",
    "device": "it must be auto, cpu, cuda or cuda:N, as cuda:0",
}
"""What the parameters that have a pattern must be, in words."""


def _sentence(detail: Mapping[str, Any]) -> str:
    """One of pydantic's error details as a sentence: parameter, value, remedy."""
    name = ".".join(str(part) for part in detail["loc"][:1])
    value, kind, context = detail["input"], detail["type"], detail.get("ctx", {})
    if kind == "value_error":  # raised by `_consistent`, a sentence already
        return str(context["error"])
    if kind == "extra_forbidden":
        return f"{name} = {value!r} is not a parameter{_did_you_mean(name)}"
    if kind == "literal_error":
        return f"{name} = {value!r} is not possible: choose {context['expected']}"
    if kind == "string_pattern_mismatch":
        return f"{name} = {value!r} is not possible: {_PATTERNS[name]}"
    message = detail["msg"].replace("Input should", "it should").replace("String should", "it should")
    hints = {"int_type": " (write it without quotes)", "float_type": " (YAML reads 1e-4 as text: write 1.0e-4)"}
    number = isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", value, re.IGNORECASE)
    return f"{name} = {value!r} is not possible: {message}{hints.get(kind, '') if number else ''}"


def _did_you_mean(name: str) -> str:
    from difflib import SequenceMatcher

    scores = {known: SequenceMatcher(None, known, name).ratio() for known in Experiment.model_fields}
    best = max(scores.values())
    closest = [known for known, score in scores.items() if score == best][:3]
    return f": did you mean {' or '.join(closest)}?" if best >= 0.6 else ": see the README's table of parameters"


class _Loader(yaml.SafeLoader):
    """YAML as `yaml.safe_load` reads it, but a key that is given twice is refused, where YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                line = key.start_mark.line + 1
                raise ConfigError(f"line {line}: {key.value!r} is given a second time: remove or rename one of the two")
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else key)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; relative paths are taken from the repository's root.

    Raises:
        ConfigError: the file cannot be read, is not YAML, gives a key twice, or holds no mapping.
    """
    file = resolve(path)
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): check the name") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not readable as YAML: {' '.join(str(error).split())}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}, {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold `name: value` lines, but holds {type(content).__name__}")
    return content


def _parameters(names: str) -> list[str]:
    """The parameters that one line of a grid's sweep names."""
    return [name.strip() for name in str(names).split(",")]


def _steps(path: Path, names: str, values: list[Any]) -> list[dict[str, Any]]:
    """What one line of a grid's sweep sets, step by step."""
    twice = [value for i, value in enumerate(values) if value in values[:i]]
    if twice:
        raise ConfigError(f"{path}: 'sweep' of '{names}' has {twice[0]!r} twice: remove one of the two")
    parameters = _parameters(names)
    if len(parameters) == 1:
        return [{parameters[0]: value} for value in values]
    if not all(isinstance(value, list) and len(value) == len(parameters) for value in values):
        raise ConfigError(f"{path}: 'sweep' of '{names}' needs lists of {len(parameters)} values each, as [42, 0]")
    return [dict(zip(parameters, value, strict=True)) for value in values]


class Grid(BaseModel):
    """Several experiments crossed with swept values. `runs` maps each run's name to its experiment."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str
    title: str
    description: str
    runs: dict[str, Experiment]


def _layers(path: Path, where: str, given: Any) -> Iterator[tuple[dict[str, Any], bool]]:
    """Values of a parameter file, of a mapping or of each in a list of such, and whether they are a file's."""
    for part in given if isinstance(given, list) else [given or {}]:
        values = read_yaml(part) if isinstance(part, str) else part
        if not isinstance(values, dict):
            raise ConfigError(
                f"{path}: {where} must be a parameter file, values, or a list of such, but holds {values!r}"
            )
        yield values, isinstance(part, str)


def load_grid(name: str) -> Grid:
    """Expand `params/grids/<name>.yaml` (or the file `name`) into runs, every one checked.

    The file holds `title`, `description`, `common` (over `params/base.yaml`), `experiments` (by label) and `sweep`
    (parameter → list, or several parameters, as "seed, data_seed" → list of lists, that change together). What is
    common, and an experiment, is a parameter file, values, or a list of such of which later ones win.
    A run is called after its label and every swept value, so a longer list adds runs and renames none.

    Raises:
        ConfigError: as `read_yaml` and `Experiment.from_mapping`, naming the run.
    """
    path = _grid_file(name)
    content = _grid_content(path)
    sweep = content["sweep"]
    swept = [parameter for names in sweep for parameter in _parameters(names)]
    for parameter in swept:
        if swept.count(parameter) > 1:
            raise ConfigError(f"{path}: 'sweep' names {parameter} twice: keep one of the two")
    base = read_yaml("params/base.yaml")
    common = [values for values, _ in _layers(path, "'common'", content["common"])]
    steps = [_steps(path, names, values) for names, values in sweep.items()]
    runs: dict[str, Experiment] = {}
    for label, given in content["experiments"].items():
        own = []
        for values, from_file in _layers(path, f"experiment {label!r}", given):
            own.append(values)
            for parameter in () if from_file else swept:  # a file's values are defaults, shared among grids
                if parameter in values:
                    raise ConfigError(
                        f"{path}: {parameter} = {values[parameter]!r} of experiment {label!r} would be overridden by "
                        "'sweep': remove one of the two"
                    )
        for combination in itertools.product(*steps):
            step = {parameter: value for part in combination for parameter, value in part.items()}
            run = "_".join([str(label), *(f"{key}-{value}" for key, value in step.items())])
            try:
                runs[run] = Experiment.from_mapping(base, *common, *own, {"experiment": str(label)}, step)
            except ConfigError as error:
                raise ConfigError(f"{path}, run {run}: {error}") from None
            _check_run_name(path, run)
    return Grid(name=path.stem, title=content["title"], description=content["description"], runs=runs)


def _grid_file(name: str) -> Path:
    path = Path(name) if name.endswith((".yaml", ".yml")) else Path("params/grids") / f"{name}.yaml"
    if not resolve(path).exists():
        known = ", ".join(sorted(file.stem for file in (ROOT / "params" / "grids").glob("*.yaml")))
        missing = f"grid {name!r} does not exist" if name else "grid = '' names no grid"
        raise ConfigError(f"{missing}: choose one of {known}, or name a .yaml file")
    ours = ROOT / "params" / "grids" / f"{path.stem}.yaml"
    if ours.exists() and resolve(path).resolve() != ours:
        raise ConfigError(f"{path}: outputs/{path.stem} belongs to params/grids/{path.stem}.yaml: rename your file")
    if not re.fullmatch(NAME, path.stem):
        raise ConfigError(f"{path}: {path.stem!r} cannot name a folder: use letters, digits, '.', '_', '+' and '-'")
    return path


def _grid_content(path: Path) -> dict[str, Any]:
    """What a grid file holds under each of its keys, checked for its shape; what it leaves out is filled in."""
    empty = {"title": path.stem, "description": "", "common": None, "experiments": {}, "sweep": {}}
    given = read_yaml(path)
    unknown = set(given) - set(empty)
    if unknown:
        raise ConfigError(f"{path}: {min(map(str, unknown))!r} is no key of a grid file: see params/grids/quick.yaml")
    content = empty | given | {key: given.get(key) or {} for key in ("experiments", "sweep")}
    experiments, sweep = content["experiments"], content["sweep"]
    if not isinstance(experiments, dict) or not experiments:
        raise ConfigError(f"{path}: 'experiments' must map at least one label to a parameter file or to values")
    if not isinstance(sweep, dict) or not all(isinstance(values, list) and values for values in sweep.values()):
        raise ConfigError(f"{path}: 'sweep' must map parameter names to non-empty lists of values")
    for key in ("title", "description"):
        if not isinstance(content[key], str):
            remedy = f"write a text after '{key}:' (a number in quotes), or leave the line out"
            raise ConfigError(f"{path}: {key} = {content[key]!r} is not possible: {remedy}")
    return content


def _check_run_name(path: Path, run: str) -> None:
    if run in ("report", "analysis") or run.startswith("corpus"):
        raise ConfigError(
            f"{path}: a run cannot be called {run!r}, as the report, the analysis and the corpus are: rename it"
        )
    if not re.fullmatch(NAME, run):  # a path among the swept values, say
        raise ConfigError(f"{path}: run {run!r} cannot name a folder: give such a value under 'experiments'")
    if len(run) > LONGEST_NAME:
        raise ConfigError(
            f"{path}: run {run!r} has a name of {len(run)} characters, more than {LONGEST_NAME}: shorten its "
            "label, or give long values under 'experiments'"
        )
