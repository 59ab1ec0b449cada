"""The same search for every neural model's hyper-parameters: `python -m ctxlm.search params/search/lstm.yaml`.

A trial is one run at the quick scale in `outputs/search/<name>/trial-NNN/`, judged on held-out training text; `--top 3`
runs the best three at full size, in `full-NNN/`. Trials that are over are not run again; `data/search/<name>.csv` holds
them all. A *point* is what a trial tries, parameter → value.
"""

import argparse
import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import optuna
import pandas as pd
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ctxlm.analysis.runs import load_runs
from ctxlm.batch import execute
from ctxlm.config import NAME, NOTEBOOKS, RESOLVED, ConfigError, Experiment, Layers, Seed, code_hash, read_yaml, shown
from ctxlm.corpus import check_data
from ctxlm.files import ROOT, atomic, parse_json, resolve
from ctxlm.results import outputs_dir, run_folder

TABLES = ROOT / "data" / "search"
FOLDERS = {"quick": "trial", "full": "full"}
"""What folders begin with, by scale."""
LAG = 3
"""A trial is chosen by those so many before it and earlier: so many can run at a time, and neither whether they do nor
where a search was interrupted changes anything."""
MOST_POINTS = 20_000
"""Points of a space that are checked before the first trial; ours have 5,000 at most."""
AT_RANDOM = 8
"""Trials that the sampler must know before it chooses by them."""
MEASURED = ("val_loss", "val_ppl", "total_seconds")
FAILED = re.compile(r"NonFiniteLoss|is not finite: the run is not written")
"""In the last line of a run that what it tried made fail; any other failure ends a search."""

Rows = dict[int, dict[str, Any]]
"""Trials by number: a row of the table each, and beside it what was drawn, and the code."""
Run = Callable[[Experiment, Path], str]
"""Carries out a run into a folder; returns why what it tried made it fail, or nothing."""


Values = Annotated[list[Any], Field(max_length=1000)]


class SearchFile(BaseModel):
    """What a file in `params/search/` holds. A line of its space may name several parameters, as one of a sweep."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    title: str
    description: str = ""
    common: Layers = []
    full: Layers
    trials: int = Field(ge=1, le=999)
    seed: Seed
    space: dict[Annotated[Any, BeforeValidator(str)], Values | dict[str, Any]] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> "SearchFile":
        names = [name for line in self.space for name in _names(line)]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"'space' names {name} twice: keep one of the two")
            for own in (own for own in (*self.common, *self.full) if isinstance(own, dict) and name in own):
                raise ValueError(f"{name} = {shown(own[name])} would be overridden by 'space': remove one of the two")
        for line, given in self.space.items():
            values, count = given if isinstance(given, list) else [], len(_names(line))
            if twice := [value for i, value in enumerate(values) if value in values[:i]]:
                raise ValueError(f"'space' of '{line}' has {shown(twice[0])} twice: remove one of the two")
            if count > 1 and not (values and all(isinstance(value, list) and len(value) == count for value in values)):
                raise ValueError(f"'space' of '{line}' needs lists of {count} values each, as [1.0, 20]")
            try:
                _distribution(given)
            except (TypeError, ValueError):
                raise ValueError(f"space, {line} = {shown(given)} is not possible: {_WORDS['space']}") from None
        return self


class Search:
    """A search file, and its trials on disk. The sampler *draws* a number for each line: of a list the index."""

    def __init__(self, path: str | Path):
        """Read the file, and say before any work what can be said.

        Raises:
            ConfigError: it holds no search, a point of it is no experiment, or its text cannot be had.
        """
        path = Path(path)
        self.name, self.home = path.stem, outputs_dir() / "search" / path.stem
        content, own = read_yaml(path), ROOT / "params" / "search" / f"{path.stem}.yaml"
        try:
            if not re.fullmatch(NAME, self.name):
                raise ConfigError(
                    f"{self.name!r} cannot name a folder: use letters, digits, '.', '_', '+' and '-' in the file's name"
                )
            if own.exists() and resolve(path).resolve() != own:
                raise ConfigError(f"outputs/search/{path.stem} belongs to params/search/{own.name}: rename your file")
            self.file = SearchFile.model_validate(content)
            quick = ["params/base.yaml", *self.file.common]
            self.layers = {
                scale: [read_yaml(layer) if isinstance(layer, str) else layer for layer in layers]
                for scale, layers in {"quick": quick, "full": [*quick, *self.file.full]}.items()
            }
            self._check()
        except ValidationError as error:
            raise ConfigError(f"{path}: {_sentences(error)}") from None
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def _check(self) -> None:
        """Refuse points that are no experiments: all values, or ends of ranges, of any three lines of the space.

        What `Experiment` refuses hangs on no more of them; all corners at once would be hundreds of thousands.
        """
        ends = {
            line: [given["low"], given["high"]] if isinstance(given, dict) else [*range(len(given))]
            for line, given in self.file.space.items()
        }
        some = [*itertools.combinations(ends, min(3, len(ends)))]
        if (count := sum(math.prod(len(ends[line]) for line in lines) for lines in some)) > MOST_POINTS:
            raise ConfigError(f"space has {count:,} points to check, more than {MOST_POINTS:,}: give fewer values")
        first = {line: values[0] for line, values in ends.items()}
        for scale in FOLDERS:
            e = self.experiment(first, scale)
            for lines in some:
                for values in itertools.product(*(ends[line] for line in lines)):
                    self.experiment(first | dict(zip(lines, values, strict=True)), scale)
            if not e.held_out_tokens:
                raise ConfigError(f"held_out_tokens = 0 at the {scale} scale: hold out text to choose by, say 4000")
            check_data([e])

    def point(self, drawn: dict[str, Any]) -> dict[str, Any]:
        """The point that is drawn."""
        found: dict[str, Any] = {}
        for line, given in self.file.space.items():
            value = drawn[line] if isinstance(given, dict) else given[drawn[line]]
            found |= dict(zip(_names(line), value if len(_names(line)) > 1 else [value], strict=True))
        return found

    def experiment(self, drawn: dict[str, Any], scale: str) -> Experiment:
        """What is drawn, at a scale.

        `logit_spread` s is logit_scale = s·√(128 / d): embeddings whose rows have one root mean square at all widths d
        then give first logits of one spread.

        Raises:
            ConfigError: it is no experiment.
        """
        own = self.point(drawn)
        if "logit_spread" in own:
            spread, width = own.pop("logit_spread"), Experiment.from_mapping(*self.layers[scale], own).embed_dim
            if not isinstance(spread, int | float):
                raise ConfigError(f"logit_spread = {spread!r} is not possible: it should be a number")
            own["logit_scale"] = spread * math.sqrt(128 / width)
        return Experiment.from_mapping(*self.layers[scale], own)

    def folder(self, scale: str, number: int) -> Path:
        """Where a trial is."""
        return self.home / f"{FOLDERS[scale]}-{number:03d}"

    def over(self) -> dict[str, Rows]:
        """The trials that are over, by scale and number; one that failed has no value.

        Raises:
            ConfigError: one is damaged, or is not what the file gives.
        """
        runs = {run["run"]: run for run in load_runs(f"search/{self.name}").to_dict("records")}
        found: dict[str, Rows] = {scale: {} for scale in FOLDERS}
        for path in sorted(self.home.glob("*-[0-9][0-9][0-9]/trial.json")):
            begin, number = path.parent.name.rsplit("-", 1)
            scale = next((scale for scale, own in FOLDERS.items() if own == begin), None)
            run = runs.get(path.parent.name)
            try:
                if not isinstance(trial := parse_json(path.read_bytes()), dict):
                    raise ValueError("it holds no trial")
            except (OSError, ValueError) as error:
                raise ConfigError(f"{path} is damaged ({error}): delete it to run that trial again") from None
            if scale is None or (run is None and "failed" not in trial):
                continue  # none of ours, or interrupted
            try:
                wanted = self.experiment(trial["drawn"], scale).for_notebook()
                given = [name for name, value in wanted.items() if value is not None and name not in RESOLVED]
                changed = [name for name in given if run and run[name] != wanted[name]]
            except (LookupError, TypeError, ConfigError):
                changed = ["space"]
            if changed:
                said = f"{path.parent} was made with another {changed[0]} than {self.name}.yaml gives it"
                raise ConfigError(f"{said}: undo the change of that file, or move {self.home} away and search anew")
            value, ppl, seconds = (run[k] for k in MEASURED) if run else (math.nan, math.nan, trial["seconds"])
            row = {"scale": scale, "trial": int(number), "value": value, "val_ppl": ppl, **self.point(trial["drawn"])}
            row |= {"seconds": seconds, "state": "finished" if run else "failed"}
            found[scale][int(number)] = row | {"drawn": trial["drawn"], "code": run and run["code_hash"]}
        return found

    def draw(self, number: int, over: Rows) -> dict[str, Any]:
        """What trial `number` tries, by those that are `over` and lie `LAG` before it or earlier."""
        space = {line: _distribution(given) for line, given in self.file.space.items()}
        seed = int(np.random.SeedSequence((self.file.seed, number)).generate_state(1)[0])
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=AT_RANDOM))
        for known in range(number - LAG + 1):
            value = over[known]["value"]
            told = {"value": math.inf if math.isnan(value) else value, "params": over[known]["drawn"]}
            study.add_trial(optuna.trial.create_trial(distributions=space, **told))
        drawn = study.ask(space).params
        for line, given in self.file.space.items():
            if isinstance(given, dict):  # three digits, which the table has
                drawn[line] = min(max(float(f"{drawn[line]:.3g}"), given["low"]), given["high"])
        return drawn

    def carry_out(self, scale: str, numbers: Sequence[int], jobs: int, run: Run) -> None:
        """Run those of the trials `numbers` that are not over, `jobs` at a time, and keep the table.

        Raises:
            ConfigError: as `over`; other code made some of them; a run failed, and not by what it tried.
        """
        over, running = self.over(), {}
        if not (waiting := [number for number in numbers if number not in over[scale]]):
            return
        run_folder(self.home)  # this process's till it ends
        e = self.experiment(self.draw(0, {}), scale)
        code = code_hash(e.model)
        if other := [number for number, row in over[scale].items() if row["code"] not in (None, code)]:
            raise ConfigError(f"{self.folder(scale, other[0])} was made by other code: move {self.home} away")
        began, count = time.monotonic(), len(waiting)
        with ThreadPoolExecutor(jobs) as pool:
            while waiting or running:
                early = scale == "quick" and waiting and running and waiting[0] - min(running.values()) >= LAG
                if waiting and len(running) < jobs and not early:
                    number = waiting.pop(0)
                    drawn = self.draw(number, over["quick"]) if scale == "quick" else over["quick"][number]["drawn"]
                    running[pool.submit(self._trial, scale, number, drawn, e.dtype, run)] = number
                    continue
                ended, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in ended:
                    future.result()
                over, numbers_ended = self.over(), [running.pop(future) for future in ended]
                self.write_table(over)
                left = len(waiting) + len(running)
                minutes = (time.monotonic() - began) / (count - left) * left / 60
                best = min(over[scale].values(), key=lambda row: (math.isnan(row["value"]), row["value"]))
                for row in (over[scale][number] for number in numbers_ended):
                    said = f"{FOLDERS[scale]} {row['trial']}: {row['value']:.4f}, best {best['value']:.4f}"
                    print(f"{self.name}, {said} ({best['trial']}), {left} left, {minutes:.0f} min", flush=True)

    def _trial(self, scale: str, number: int, drawn: dict[str, Any], dtype: str, run: Run) -> None:
        """Run one trial; its `trial.json` says what was drawn and, of one that failed, why."""
        folder, began = self.folder(scale, number), time.monotonic()

        def note(**said: Any) -> None:
            with atomic(folder / "trial.json") as path:
                path.write_text(json.dumps({"drawn": drawn} | said) + "\n", encoding="utf-8")

        (folder / "metrics.json").unlink(missing_ok=True)  # of a run that has lost its trial.json
        note()
        why = run(self.experiment(drawn, scale).model_copy(update={"dtype": dtype}), folder)
        if why:
            note(failed=why, seconds=time.monotonic() - began)

    def write_table(self, over: dict[str, Rows]) -> Path:
        """Write `data/search/<name>.csv` anew: value and val_ppl are of the held-out text, in nats and as PPL."""
        rows = [row for rows in over.values() for row in rows.values()]
        with atomic(TABLES / f"{self.name}.csv") as path:
            pd.DataFrame(rows).drop(columns=["drawn", "code"]).to_csv(path, index=False, float_format="%.6g")
        return TABLES / f"{self.name}.csv"


def run_notebook(experiment: Experiment, folder: Path) -> str:
    """Carry out a run as a grid's are: by papermill, in a process of its own, on one thread. A `Run`.

    Raises:
        ConfigError: it failed, and not because a loss is not finite; or its kernel died again and again.
    """
    values = experiment.for_notebook() | {"output_dir": str(folder)}
    done, executed = folder / "metrics.json", folder / "experiment.ipynb"
    why = execute(NOTEBOOKS[experiment.model], executed, done, values, f"search/{folder.parent.name}/{folder.name}")
    if why and not FAILED.search(why):
        raise ConfigError(f"{folder}: {why}")
    return why


def main(arguments: list[str] | None = None, run: Run = run_notebook) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="params/search/<name>.yaml")
    parser.add_argument("--top", type=int, default=0, help="run so many of the best trials at full size instead")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help=f"runs at a time, of trials at most {LAG}")
    options = parser.parse_args(arguments)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        if options.top < 0 or options.jobs < 1:
            raise ConfigError(f"--top {options.top} --jobs {options.jobs} is not possible: give whole numbers above 0")
        search = Search(options.file)
        scale, numbers = "quick", [*range(search.file.trials)]
        if options.top:
            rows = search.over()["quick"]
            if missing := {*numbers} - {*rows}:
                raise ConfigError(f"{len(missing)} of {len(numbers)} trials are not over: search without --top first")
            finished = sorted((row["value"], number) for number, row in rows.items() if row["state"] == "finished")
            scale, numbers = "full", [number for _, number in finished[: options.top]]
        search.carry_out(scale, numbers, options.jobs, run)
        print(search.write_table(search.over()))
    except (ConfigError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _names(line: str) -> list[str]:
    """The parameters that a line of a space names."""
    return [name.strip() for name in line.split(",")]


def _distribution(given: list[Any] | dict[str, Any]) -> BaseDistribution:
    """What a line's number is drawn from; raises TypeError or ValueError where that cannot be."""
    return FloatDistribution(**given) if isinstance(given, dict) else CategoricalDistribution([*range(len(given))])


_WORDS = {
    "extra_forbidden": "it is no key of a search, see params/search/lstm.yaml",
    "missing": "it is missing, see params/search/lstm.yaml",
    "space": "give a list of values, or low <= high (above 0 with log: true)",
}


def _sentences(error: ValidationError) -> str:
    """What is wrong with a file, in one line, a sentence for each key."""
    said = {}
    for detail in error.errors():
        key = ", ".join(str(part)[:100] for part in detail["loc"][:2])
        remedy = _WORDS.get(detail["type"]) or _WORDS.get(key.split(",")[0]) or detail["msg"].replace("Input", "it")
        value = "" if detail["type"] == "missing" else f" = {shown(detail['input'])}"
        # without a key it was raised by the validator of the whole, a sentence already
        said[key] = f"{key}{value} is not possible: {remedy}" if key else str(detail["ctx"]["error"])
    return "; ".join([*said.values()][:9])


if __name__ == "__main__":
    sys.exit(main())
