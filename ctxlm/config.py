"""`Experiment`: every parameter of one run, under the study's own names, checked before any work starts.

A grid file names several experiments and the values to sweep; `load_grid` expands it into runs.
"""

import ast
import difflib
import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ctxlm.files import ROOT, digest, find, resolve, source_hash

MOST, LARGEST = 10**9, 1e30
"""The largest whole number, and the largest other, that a parameter can be; float32 ends at 3e38."""
Count = Annotated[int, Field(ge=1, le=MOST)]
Natural = Annotated[int, Field(ge=0, le=MOST)]
Width = Annotated[int, Field(ge=1, le=65_536)]
UpTo64 = Annotated[int, Field(ge=1, le=64)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, le=LARGEST)]

CORPORA = "(chitchat|sotu|docstrings|ultrachat)"
"""Corpora that have a name."""
NETWORKS = ("lstm", "transformer")
"""Values of `model` that `ctxlm.networks` trains."""
BASELINES = ("kneser-ney", *NETWORKS)
"""Values of `model` beside the two-phase one."""
NOTEBOOKS = {"context": "notebooks/02_experiment.ipynb"} | dict.fromkeys(BASELINES, "notebooks/03_baseline.ipynb")
"""What runs each `model`."""
BASELINES_ALONE = ("ngram_order", "ngram_second_half", "hidden_dim", "window", "num_heads")
"""Parameters that the context model does not read."""
CONTEXT_ALONE = (
    *("design", "context_dim", "num_input_tokens", "use_weight_tying", "phase1_init_std", "dist_reg_weight"),
    *("phase1_learning_rate", "phase1_batch_size", "phase1_min_iterations", "phase1_max_iterations"),
    *("phase1_convergence_threshold", "phase1_min_converged_ratio", "phase1_context_noise", "phase1_gradient_clip"),
    *("phase2_context_window", "phase2_init_std", "phase2_shuffle", "context_ablation", "context_rank"),
)
"""Parameters that no other model reads."""
DATA_PARAMETERS = {
    *("corpus", "embedding", "embed_dim", "val_samples", "development_samples", "test_samples", "max_sample_tokens")
}
"""Parameters of what is read and judged, size and replicate apart."""
RESOLVED = ("device", "dtype")
"""Parameters of which a run holds what `auto` became."""
MODULES = {"context": ("phase1", "phase2", "memory"), "kneser-ney": ("ngrams",)} | dict.fromkeys(
    NETWORKS, ("networks",)
)
"""The modules of `ctxlm` that a run of each `model` enters by; what these import belongs to it too."""

NAME = r"[A-Za-z0-9][A-Za-z0-9_.+-]*"
"""What a run or a grid may be called, since it names a folder."""
LONGEST_NAME = 200
"""Characters of a run's name; file systems take 255 bytes."""
MOST_RUNS = 1_000
"""Runs of a grid: more are a slip, which would be found out after minutes of checks."""
MOST_WEIGHTS = 10**10
"""Weights of a model: 40 GB in float32, and four times that with their gradients and Adam's averages."""
LONGEST_FILE = 1_000_000
"""Bytes of a YAML file."""
MOST_NODES = 100_000
"""Values in a YAML file, those that an alias stands for counted once more for every alias."""


def code_hash(model: str = "context") -> str:
    """Digest of the code that a run's numbers depend on: its model's modules and the notebook that runs it."""
    return source_hash(*(f"ctxlm/{name}.py" for name in MODULES[model]), NOTEBOOKS[model])


class ConfigError(ValueError):
    """A parameter that cannot be used; the message names it, its value and the remedy in one sentence.

    Control characters in it, which come from files and values, are shown: a terminal would obey them.
    """

    def __init__(self, said: str):
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in said))

    def _render_traceback_(self) -> list[str]:
        """What Jupyter shows: the sentence, not the way to it."""
        return [f"{type(self).__name__}: {self}"]


def shown(value: Any) -> str:
    """A value as a sentence has it: as Python writes it, but of a long one only both ends."""
    try:
        text = repr(value)
    except ValueError:
        return "(a number of more than 4,300 digits)"  # which Python does not write
    return text if len(text) <= 200 else f"{text[:120]} … {text[-40:]}"


def check_output_dir(path: Any) -> None:
    """Refuse an `output_dir` that names no folder for a run, or one among the repository's own files.

    Raises:
        ConfigError: it is no path, or lies in the repository but not in `outputs`, or is that itself.
    """
    said = f"output_dir = {shown(str(path) if isinstance(path, Path) else path)} is not possible"
    if not isinstance(path, str | Path) or not str(path).strip() or "\0" in str(path):
        raise ConfigError(f"{said}: name a folder for the run, as outputs/mine/A")
    folder = resolve(path).resolve()
    homes = [resolve(home).resolve() for home in ("outputs", os.environ.get("CTXLM_OUTPUTS") or "outputs")]
    if folder in homes or (folder.is_relative_to(ROOT) and not any(map(folder.is_relative_to, homes))):
        raise ConfigError(f"{said}, for other files are there: name a folder of its own, as outputs/mine/A")


class Experiment(BaseModel):
    """One run, of the two-phase context language model or another; by default as the study's (`params/base.yaml`)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    experiment: str = Field(
        "A", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=60, description="label of the configuration"
    )
    # What is read
    corpus: str = Field(
        "chitchat",
        pattern=rf"^({CORPORA}(\+{CORPORA})*|[^\p{{Cc}}]+\.(?i:txt|jsonl|parquet))$",
        max_length=1000,
        description="chitchat, sotu, docstrings or ultrachat, several of them in turn (chitchat+sotu), or a .txt, "
        ".jsonl or .parquet file",
    )
    embedding: str = Field(
        "ppmi",
        pattern=r"^(ppmi|smollm2|random|gpt2|[^\p{Cc}]+\.safetensors)$",
        max_length=1000,
        description="ppmi, smollm2, random, gpt2, or a .safetensors file holding wte",
    )
    embedding_seed: Seed = Field(
        0, description="0: the embedding as it is; otherwise its dimensions' signs, or random's numbers, are drawn"
    )
    embedding_rotated: bool = Field(False, description="embedding_seed draws a rotation of ppmi instead of its signs")
    embedding_turned: int | None = Field(
        None, ge=0, lt=65_536, description="the dimension of ppmi (0: the strongest) whose sign is turned; null: none"
    )
    train_tokens: Count | None = Field(86_925, description="training tokens, cut exactly (or give train_samples)")
    train_samples: Count | None = Field(None, description="training samples, whole (or give train_tokens)")
    data_seed: int = Field(
        0, ge=0, lt=60, description="the training window begins at so many sixtieths of the training capacity"
    )
    val_samples: Count = Field(200, description="validation samples, which choose the epoch: the first of their region")
    development_samples: Count = Field(
        200, description="development samples, on which settings are chosen: the first of their region"
    )
    test_samples: Count = Field(200, description="test samples, by which nothing is chosen: the first of their region")
    max_sample_tokens: Count | None = Field(
        256, description="a judged sample is cut to its first so many tokens; null: it is whole"
    )
    held_out_tokens: Natural = Field(
        0, description="for tuning: so many last training tokens are left out, and stand in for validation"
    )
    # The model
    model: Literal["context", "kneser-ney", "lstm", "transformer"] = Field(
        "context", description="the two-phase context language model, or another to set beside it"
    )
    design: Literal["constant", "arithmetic"] = Field(
        "constant", description="width of the layers: constant, or falling in an arithmetic progression"
    )
    num_layers: int = Field(6, ge=1, le=1024, description="layers of each block, L")
    context_dim: int = Field(768, ge=2, le=65_536, description="width of the context, C")
    embed_dim: Width = Field(768, description="width of a token embedding, d")
    num_input_tokens: UpTo64 = Field(2, description="tokens read at a time, n")
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
    phase1_context_noise: float = Field(0.1, ge=0, le=LARGEST, description="sd of the noise on contexts read")
    phase1_gradient_clip: Positive = Field(1.0, description="largest gradient norm in Phase 1")
    # Phase 2
    phase2_learning_rate: Positive = Field(0.002, description="Adam's learning rate in Phase 2")
    phase2_batch_size: Count = Field(512, description="tokens per update, consecutive unless shuffled")
    phase2_epochs: Count = Field(10, description="Phase 2 ends here at the latest")
    phase2_patience: Count = Field(2, description="epochs without a better validation loss before stopping")
    phase2_gradient_clip: Positive = Field(1.0, description="largest gradient norm in Phase 2")
    phase2_freeze_embedding: bool = Field(True, description="keep the embedding fixed in Phase 2")
    # The tuned recipe's ingredients: what the study does not have, off by default
    output_bias: Literal["none", "unigram"] = Field(
        "none", description="unigram: a trained bias of the output, started at the training tokens' log frequencies"
    )
    phase2_init_std: Positive = Field(0.1, description="sd of the TokenBlock's initial weights (of biases a tenth)")
    logit_scale: Positive = Field(1.0, description="factor of the logits, bias apart")
    phase2_context_window: Natural = Field(
        0, description="tokens that Phase 2 trains the ContextBlock through at a time; 0: it stays as it is"
    )
    slow_decay: Share = Field(
        0.0, description="decay a token of a slow context, a decayed sum of embeddings that the head reads too; 0: none"
    )
    phase2_shuffle: bool = Field(
        False, description="updates read tokens (or whole windows of them) in random order, not the stream's"
    )
    phase2_warmup_updates: Natural = Field(0, description="updates over which the learning rate rises from 0")
    phase2_final_rate: float = Field(
        1.0, gt=0, le=1, description="the learning rate after phase2_epochs as a share of its peak (half a cosine)"
    )
    phase2_token_dropout: Share = Field(
        0.0, description="share of the input tokens blanked in training; the ContextBlock reads them all the same"
    )
    phase2_weight_average: Share = Field(
        0.0, description="decay an update of the average of the weights that is judged and kept; 0: none"
    )
    # Other models
    ngram_order: UpTo64 = Field(4, description="tokens that an n-gram of kneser-ney spans")
    ngram_second_half: bool = Field(
        False, description="kneser-ney counts the text that the ppmi embedding has read, too"
    )
    hidden_dim: Width = Field(1712, description="width of the lstm's state, or of the transformer's layers")
    window: Count = Field(32, description="tokens an lstm is trained through at a time, or a transformer sees at most")
    num_heads: Count = Field(8, description="attention heads of a layer of the transformer")
    # Looking into it
    context_ablation: Literal["none", "zero", "random_tokens"] = Field(
        "none", description="what the TokenBlock reads: its contexts (none), zeros, or contexts of shuffled tokens"
    )
    context_rank: Natural = Field(
        0, description="the TokenBlock reads so many principal dimensions of every layer's contexts; 0: all"
    )
    train_loss_after_epoch: bool = Field(False, description="measure the training loss also after every epoch")
    val_every_steps: Natural = Field(0, description="validate also every so many updates; 0: after epochs only")
    # The machine
    seed: Seed = Field(42, description="of initialisation, noise and order")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the matrix products in both phases; auto: the faster one, the same for a whole grid"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Experiment":
        def refuse(remedy: str, *names: str) -> None:
            raise ValueError(f"{' and '.join(f'{name} = {getattr(self, name)!r}' for name in names)}: {remedy}")

        if self.least_weights > MOST_WEIGHTS:
            remedy = f"a model of {self.least_weights:.0e} weights or more has room on no machine: lower one of them"
            refuse(remedy, "num_layers", "context_dim" if self.model == "context" else "hidden_dim")
        if (self.train_tokens is None) == (self.train_samples is None):
            remedy = "give exactly one of the two and set the other to null (on papermill's command line: None)"
            refuse(remedy, "train_tokens", "train_samples")
        if self.ngram_second_half and self.model != "kneser-ney":
            refuse("only kneser-ney counts, so set the first to false", "ngram_second_half", "model")
        if self.embedding_rotated and not (self.embedding == "ppmi" and self.embedding_seed):
            remedy = "only ppmi is rotated, by a number from 1 on, so set the first to false or mend the others"
            refuse(remedy, "embedding_rotated", "embedding", "embedding_seed")
        if self.embedding_turned is not None and not (
            self.embedding == "ppmi" and self.embedding_turned < self.embed_dim
        ):
            remedy = "only ppmi has such signs, one a dimension, so set the first to null or to less than embed_dim"
            refuse(remedy, "embedding_turned", "embedding", "embed_dim")
        if self.phase1_min_iterations > self.phase1_max_iterations:
            refuse("lower the first or raise the second", "phase1_min_iterations", "phase1_max_iterations")
        if self.model in NETWORKS:
            if self.model == "transformer" and self.hidden_dim % self.num_heads:
                refuse("the first must divide among the second, so change one of them", "hidden_dim", "num_heads")
            if self.phase2_batch_size % self.window:
                refuse("the first must be a multiple of the second, so change one", "phase2_batch_size", "window")
            others = "use_weight_tying phase2_shuffle phase2_context_window phase2_init_std design"
            for name in f"{others} context_ablation context_rank".split():
                if getattr(self, name) != (default := type(self).model_fields[name].default):
                    refuse(f"that model has no such switch, so set it to {default!r}", name, "model")
        if self.model == "context":
            window = self.phase2_context_window
            if window and self.phase2_batch_size % window:
                remedy = "the first must be a multiple of the second, for a batch holds whole windows"
                refuse(remedy, "phase2_batch_size", "phase2_context_window")
            for name in ("phase2_context_window", "slow_decay"):
                if getattr(self, name) and self.context_ablation != "none":
                    remedy = "the second replaces no contexts that the first trains or adds: set one to its default"
                    refuse(remedy, name, "context_ablation")
            if self.context_rank and window:
                refuse(
                    "the first keeps part of contexts that stay: set one to 0", "context_rank", "phase2_context_window"
                )
            if self.context_rank and self.context_ablation != "none":
                refuse("both replace the contexts: set one to its default", "context_rank", "context_ablation")
            if self.context_rank > self.context_dim:
                refuse("a context has no more dimensions: lower the first", "context_rank", "context_dim")
            targets = (self.train_tokens or 0) - self.held_out_tokens - 1
            if targets > 0:  # otherwise only the corpus tells how many updates there are
                self.check_warmup(-(-targets // self.phase2_batch_size))
        return self

    @property
    def least_weights(self) -> int:
        """Weights that the model has at least: those of the products between its layers' own widths."""
        if self.model == "context":
            return self.num_layers * self.context_dim**2 // (1 if self.design == "constant" else 4)
        return self.num_layers * self.hidden_dim**2 if self.model in NETWORKS else 0

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

    @classmethod
    def from_mapping(cls, *layers: Mapping[str, Any]) -> "Experiment":
        """An experiment from parameter mappings, later ones overriding earlier ones.

        Raises:
            ConfigError: an unknown name, a wrong type, a value out of bounds: one sentence for each, on one line.
        """
        merged = {str(name): value for layer in layers for name, value in layer.items()}  # YAML's `1:` is no text
        return _validated(cls, merged)

    @classmethod
    def from_namespace(cls, namespace: dict[str, Any], also: tuple[str, ...] = ("output_dir",)) -> "Experiment":
        """An experiment from a notebook's `globals()`, called before the notebook defines anything but parameters.

        papermill only warns about a parameter it does not know, and injects it all the same; here every such name is
        refused that is none (nor in `also`). By hand, cells are run again, and others stand between: of names that
        they make only those are refused that look like a misspelt parameter, and only as long as a cell makes them,
        from the parameters' one on as it was run last.

        Raises:
            ConfigError: as `from_mapping` and `check_output_dir`; or a corpus's or an embedding's file is not there.
        """
        data = (bool, int, float, str, list, dict, type(None))
        there = {name for name, value in namespace.items() if type(value) in data and not name.startswith("_")}
        there -= {*also, "In", "Out"}  # the latter are IPython's
        if cells := _since_parameters(namespace.get("In") or []):
            injected = {name for cell in cells if cell.lstrip().startswith("# Parameters") for name in _assigned(cell)}
            by_hand = {name for cell in cells for name in _assigned(cell) if _closest(name)}
            there &= injected | by_hand
        if "output_dir" in also and namespace.get("output_dir") is not None:
            check_output_dir(namespace["output_dir"])
        found = cls.from_mapping({name: namespace[name] for name in there | (cls.model_fields.keys() & namespace)})
        for name, value in (("corpus", found.corpus), ("embedding", found.embedding)):
            if "." in value and not find(value).is_file():
                raise ConfigError(f"{name} = {shown(value)} is no file at {find(value)}: check the name")
        return found

    def meant_for(self, notebook: str) -> "Experiment":
        """Itself, once it is known that this notebook (its path in the repository) runs its model.

        Raises:
            ConfigError: another one does.
        """
        if NOTEBOOKS[self.model] != notebook:
            raise ConfigError(f"model = {self.model!r} is run by {NOTEBOOKS[self.model]}, not by this notebook")
        return self

    def for_notebook(self) -> dict[str, Any]:
        """The parameters that its model reads, which are those of the notebook that runs it: name → value."""
        return self.model_dump(exclude={*(BASELINES_ALONE if self.model == "context" else CONTEXT_ALONE)})

    def is_that_of(self, run: Mapping[str, Any]) -> bool:
        """Whether a finished run, its metrics.json or a row, has these parameters, as far as its model reads them."""
        size = "train_samples" if self.train_samples is None else "train_tokens"  # what follows from the other one
        for name, value in self.for_notebook().items():
            found = run.get(name, type(self).model_fields[name].default)  # of a run that is older than the parameter
            missing = found is None or found != found
            if name not in (*RESOLVED, size) and (not missing if value is None else found != value):
                return False
        return True

    @property
    def params_hash(self) -> str:
        """Digest of every parameter: equal for equal experiments, whatever the order they were written in."""
        return digest(json.dumps(self.model_dump(), sort_keys=True))


def _since_parameters(cells: Sequence[Any]) -> list[str]:
    """Of IPython's record of what was run, what is of now: from the last cell on that assigns `train_tokens`."""
    own = [str(cell) for cell in cells]
    return own[max((place for place, cell in enumerate(own) if "train_tokens" in _assigned(cell)), default=len(own)) :]


def _assigned(cell: str) -> set[str]:
    """Names that a cell assigns, loops' too; none where it is no Python."""
    try:
        nodes = ast.walk(ast.parse(cell))
    except SyntaxError:
        return set()
    return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


_WORDS = {
    "experiment": "a label must hold letters, digits, '.', '_' and '-' only, and begin with a letter or a digit",
    "corpus": "name chitchat, sotu, docstrings or ultrachat, several joined by +, or a .txt, .jsonl or .parquet file",
    "embedding": "choose ppmi, smollm2, random, gpt2 or a .safetensors file",
    "device": "it must be auto, cpu, cuda or cuda:N, as cuda:0",
    "title": "write a text after it (a number in quotes), or leave the line out",
    "description": "write a text after it (a number in quotes), or leave the line out",
    "experiments": "it must map at least one label to a parameter file, to values, or to a list of such",
    "sweep": "it must map parameter names to non-empty lists of values",
    "common": "it must be a parameter file, values, or a list of such",
}
"""What pydantic's own messages would not say plainly."""


def _validated(kind: type[BaseModel], values: Mapping[str, Any]) -> Any:
    """An instance of a model, or what is wrong with its values in one line, a sentence each."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        details = {detail["loc"][:1]: detail for detail in error.errors()}  # of a union's, one
        said = [_sentence(kind, detail) for detail in itertools.islice(details.values(), 9)]
        raise ConfigError("; ".join(said) + f"; and {len(details) - 9} more" * (len(details) > 9)) from None


def _sentence(kind: type[BaseModel], detail: Mapping[str, Any]) -> str:
    """One of pydantic's error details as a sentence: parameter, value, remedy."""
    if not detail["loc"]:  # raised by a validator of the whole, a sentence already
        return str(detail["ctx"]["error"])
    name, value = str(detail["loc"][0])[:100], detail["input"]
    if name in ("experiments", "sweep") and len(detail["loc"]) > 1:
        name = f"{name}, {str(detail['loc'][1])[:100]}"
    if detail["type"] == "extra_forbidden":
        if kind is not Experiment:
            return f"{name!r} is no key of a grid file: see params/grids/quick.yaml"
        closest = _closest(name, 0.6)
        hint = f"did you mean {' or '.join(closest)}?" if closest else "see docs/parameters.md"
        return f"{name} = {shown(value)} is not a parameter: {hint}"
    said = detail["msg"].replace("Input should", "it should").replace("String should", "it should")
    if detail["type"] == "literal_error":
        said = f"choose {detail['ctx']['expected']}"
    elif detail["type"] != "string_too_long":
        said = _WORDS.get(name.partition(",")[0], said)
    if isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", value, re.IGNORECASE):
        hints = {
            "int_type": " (write it without quotes or a 0 before it)",
            "float_type": " (YAML reads 1e-4 as text: write 1.0e-4)",
        }
        said += hints.get(detail["type"], "")
    return f"{name} = {shown(value)} is not possible: {said}"


def _closest(name: str, least: float = 0.8) -> list[str]:
    """The parameters that a name resembles most, if it resembles any that much."""
    name = name[:100].lower()
    scores = {known: difflib.SequenceMatcher(None, known, name).ratio() for known in Experiment.model_fields}
    best = max(scores.values())
    return [known for known, score in scores.items() if score == best][:3] if best >= least else []


class _Loader(yaml.SafeLoader):
    """YAML as `yaml.safe_load` reads it, with three traps shut.

    A key that is given twice is refused, where YAML would keep the last. Aliases of aliases, which a few lines multiply
    to billions of values, have a bound. And what YAML 1.1 takes for a number or a date without looking like one, as
    20:00 (1200), 010 (8) and 2026-11-28, stays a text.
    """

    def __init__(self, text: str):
        super().__init__(text)
        self.nodes, self.sizes = 0, {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        alias, before = self.check_event(yaml.AliasEvent), self.nodes
        node = super().compose_node(parent, index)
        if alias and node not in self.sizes:
            raise ConfigError(f"line {node.start_mark.line + 1}: what is given there holds itself: write it out")
        self.nodes += self.sizes[node] if alias else 1
        self.sizes.setdefault(node, self.nodes - before)
        if self.nodes > MOST_NODES:
            raise ConfigError(f"it has more than {MOST_NODES:,} values, aliases written out: give fewer")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                line = key.start_mark.line + 1
                raise ConfigError(f"line {line}: {key.value!r} is given a second time: remove or rename one of the two")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_UNLIKE = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag not in _UNLIKE]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_WHOLE, _REAL = r"[-+]?(0|[1-9][0-9_]*)", r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+][0-9]+)?"
_Loader.add_implicit_resolver(_UNLIKE[0], re.compile(f"^{_WHOLE}$"), [*"-+0123456789"])
_Loader.add_implicit_resolver(
    _UNLIKE[1], re.compile(rf"^({_REAL}|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"), [*"-+0123456789."]
)


def parse_yaml(text: str | bytes) -> Any:
    """What a text says in YAML. Nothing in it is run, and what its aliases stand for has a bound.

    Raises:
        ConfigError: it is no YAML, too long or too deep, or gives a key twice.
    """
    if len(text) > LONGEST_FILE:
        raise ConfigError(f"it has more than {LONGEST_FILE:,} bytes, which no parameters need: name another file")
    try:
        return yaml.load(text.decode("utf-8") if isinstance(text, bytes) else text, _Loader)
    except ConfigError:
        raise
    except RecursionError:
        raise ConfigError("it is nested too deep: write it flat") from None
    except Exception as error:  # a tag on a text that it does not fit can raise nearly anything
        said = " ".join(str(error).replace(' in "<unicode string>",', " in").split())
        raise ConfigError(f"it is not readable as YAML ({said[:300]}): mend it") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; relative paths are taken from the repository's root.

    Raises:
        ConfigError: the file cannot be read, holds no mapping, or as `parse_yaml`.
    """
    try:
        with resolve(path).open("rb") as file:
            content = parse_yaml(file.read(LONGEST_FILE + 1))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (OSError, ValueError) as error:  # the latter, of a name that no file can have
        raise ConfigError(f"{path} cannot be read ({getattr(error, 'strerror', error)}): check the name") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold `name: value` lines, but holds {type(content).__name__}")
    return content


def _as_list(given: Any) -> list[Any]:
    return given if isinstance(given, list) else [given or {}]


Layers = Annotated[list[str | dict[Any, Any]], BeforeValidator(_as_list)]
"""A parameter file, values, or a list of such, of which later ones win."""


class GridFile(BaseModel):
    """What a file in `params/grids/` holds."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    title: str
    description: str = ""
    common: Layers = []
    experiments: dict[Annotated[Any, BeforeValidator(str)], Layers] = Field(min_length=1)
    sweep: dict[Annotated[Any, BeforeValidator(str)], Annotated[list[Any], Field(min_length=1)]] = {}

    @property
    def swept(self) -> list[str]:
        """The parameters that the sweep names."""
        return [name for names in self.sweep for name in _names(names)]

    @model_validator(mode="after")
    def _consistent(self) -> "GridFile":
        count = len(self.experiments) * math.prod(map(len, self.sweep.values()))
        if count > MOST_RUNS:
            raise ValueError(f"'experiments' times 'sweep' are {count:,} runs, more than {MOST_RUNS:,}: give fewer")
        for name in self.swept:
            if self.swept.count(name) > 1:
                raise ValueError(f"'sweep' names {name} twice: keep one of the two")
            for label, given in self.experiments.items():  # a file's values are defaults, shared among grids
                for own in (own for own in given if isinstance(own, dict) and name in own):
                    raise ValueError(
                        f"{name} = {shown(own[name])} of experiment {label!r} would be overridden by 'sweep': "
                        "remove one of the two"
                    )
        for names, values in self.sweep.items():
            if twice := [value for i, value in enumerate(values) if value in values[:i]]:
                raise ValueError(f"'sweep' of '{names}' has {shown(twice[0])} twice: remove one of the two")
            count = len(_names(names))
            if count > 1 and not all(isinstance(value, list) and len(value) == count for value in values):
                raise ValueError(f"'sweep' of '{names}' needs lists of {count} values each, as [42, 0]")
        return self

    def steps(self) -> Iterator[dict[str, Any]]:
        """The sweep's values, combination by combination."""
        lines = []
        for names, values in self.sweep.items():
            several = len(_names(names)) > 1
            lines.append([dict(zip(_names(names), value if several else [value], strict=True)) for value in values])
        for combination in itertools.product(*lines):
            yield {name: value for part in combination for name, value in part.items()}


def _names(line: str) -> list[str]:
    """The parameters that one line of a sweep names."""
    return [name.strip() for name in line.split(",")]


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
    path = _grid_file(name)
    given = {"title": path.stem} | read_yaml(path)
    # a key without a value is one that is left out
    given = {key: value for key, value in given.items() if value is not None or key in ("title", "description")}
    where, runs = str(path), {}
    try:
        file: GridFile = _validated(GridFile, {"experiments": {}} | given)
        base = [read_yaml("params/base.yaml"), *_read(file.common)]
        for label, layers in file.experiments.items():
            where = f"{path}, experiment {label}"
            own = _read(layers)
            for step in file.steps():
                run = "_".join([label, *(f"{key}-{value}" for key, value in step.items())])
                where = f"{path}, run {run}"
                runs[run] = Experiment.from_mapping(*base, *own, {"experiment": label}, step)
                _check_name(run)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return Grid(name=path.stem, title=file.title, description=file.description, runs=runs)


def _read(layers: list[str | dict[str, Any]]) -> list[dict[str, Any]]:
    return [read_yaml(layer) if isinstance(layer, str) else layer for layer in layers]


def _grid_file(name: str) -> Path:
    path = Path(name) if name.endswith((".yaml", ".yml")) else Path("params/grids") / f"{name}.yaml"
    ours = ROOT / "params" / "grids"
    if not resolve(path).exists():
        known = ", ".join(sorted(file.stem for file in ours.glob("*.yaml")))
        missing = f"grid {name!r} does not exist" if name else "grid = '' names no grid"
        raise ConfigError(f"{missing}: choose one of {known}, or name a .yaml file")
    own = ours / f"{path.stem}.yaml"
    if own.exists() and resolve(path).resolve() != own:
        raise ConfigError(f"{path}: outputs/{path.stem} belongs to params/grids/{path.stem}.yaml: rename your file")
    if not re.fullmatch(NAME, path.stem):
        raise ConfigError(f"{path}: {path.stem!r} cannot name a folder: use letters, digits, '.', '_', '+' and '-'")
    return path


def _check_name(run: str) -> None:
    """Refuse a run's name that cannot be its folder's."""
    if run in ("report", "analysis", "dtype") or run.startswith("corpus"):
        raise ConfigError("the report, the analysis, the corpus and the type of products are called so: rename it")
    if not re.fullmatch(NAME, run):  # a path among the swept values, say
        raise ConfigError("that cannot name a folder: give such a value under 'experiments'")
    if len(run) > LONGEST_NAME:
        raise ConfigError(
            f"its name has {len(run)} characters, more than {LONGEST_NAME}: shorten its label, or give long values "
            "under 'experiments'"
        )


def parameters_table() -> str:
    """`docs/parameters.md`: `make docs` writes it, and a test holds it."""
    rows = ["# Parameters", "", "Generated from `ctxlm.config.Experiment` by `make docs`; edit them there.", ""]
    said = "papermill reads YAML 1.1, where `20:00` is 1200, `010` is 8 and `1e-4` is text. In grid files and searches "
    rows += [said + "all three are text, and so refused as a number.", ""]
    rows += ["| parameter | default | meaning |", "|---|---|---|"]
    for name, field in Experiment.model_fields.items():
        default = json.dumps(field.default).strip('"')
        rows.append(f"| `{name}` | {default} | {field.description} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "parameters.md").write_text(parameters_table(), encoding="utf-8")
