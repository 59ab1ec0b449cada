"""Hyper-parameters by Optuna, the same way for every model: `python -m ctxlm.search params/search/lstm.yaml`.

A trial is one run at the quick scale in `outputs/search/<name>/quick-NNN/`, judged on held-out training text; Optuna's
journal beside them is what a search that was stopped goes on from. `data/search/<name>.csv` holds all of them. Of
these, `--top 3` runs the best three at full size, in `full-NNN/`, judged on development.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Annotated, Any

import numpy as np
import optuna
import pandas as pd
import torch
from optuna.distributions import FloatDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState
from pydantic import Field
from snakemake.utils import available_cpu_count

from ctxlm.batch import run_apart, visible_gpus
from ctxlm.config import Checked, ConfigError, Experiment, Layers, Seed, code_hash, read_layers, read_yaml, sweep
from ctxlm.corpus import check_data
from ctxlm.files import ROOT, atomic, digest, outputs_dir, take
from ctxlm.networks import BODIES

TABLES = ROOT / "data" / "search"
SCALES = ("quick", "full")
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)
"""States of a trial that has ended; pruned is one whose loss is not finite."""
AT_RANDOM = 16
"""Trials drawn at random first, of all turns together."""


class SearchFile(Checked):
    """What a file in `params/search/` holds. A line of its space may name several parameters, as one of a sweep."""

    title: str
    description: str = ""
    common: Layers = []  # noqa: RUF012 (pydantic copies it)
    full: Layers
    trials: int = Field(ge=1, le=999)
    seed: Seed
    """Of the sampler, which with several jobs draws by chance all the same."""
    turns: str
    """A line of the space whose values take turns, each with a sampler of its own: none is dropped early."""
    space: dict[str, Annotated[list[Any], Field(min_length=1)] | dict[str, float | bool]] = Field(min_length=1)


class Search:
    """A search, its studies and its folder."""

    def __init__(self, path: str | Path):
        """Read the file and see that its points are experiments.

        Raises:
            ConfigError: the file, or an end of its space, is not possible.
        """
        self.name, self.home = Path(path).stem, outputs_dir() / "search" / Path(path).stem
        self.table = TABLES / f"{self.name}.csv"
        self.interrupted, self.drawing = False, Lock()
        try:
            self.file = SearchFile(**read_yaml(path))
            quick = [read_yaml("params/base.yaml"), *read_layers(self.file.common)]
            self.layers = {"quick": quick, "full": [*quick, *read_layers(self.file.full)]}
            for line in self.file.space:
                for value in self._ends(line):
                    tried = {scale: self.experiment(self.first | {line: value}, scale) for scale in SCALES}
                    if not tried["quick"].held_out_tokens:
                        raise ConfigError("held_out_tokens = 0: hold out text to choose by")
            if not isinstance(self.file.space.get(self.file.turns), list):
                raise ConfigError(f"turns = {self.file.turns!r}: name a line of the space that is a list")
            for scale in SCALES:
                check_data([self.experiment(self.first, scale)])
        except (ConfigError, LookupError, TypeError, ValueError) as error:
            raise ConfigError(f"{path}: {error}") from None

    @property
    def first(self) -> dict[str, Any]:
        """The first value of every line of the space, as if it were drawn."""
        return {line: self._ends(line)[0] for line in self.file.space}

    def _ends(self, line: str) -> list[Any]:
        """The values of a line of the space, or the ends of its range."""
        given = self.file.space[line]
        if isinstance(given, list):
            return given
        try:
            between = FloatDistribution(**given)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"space, {line}: {error}") from None
        return [between.low, between.high]

    def experiment(self, drawn: Mapping[str, Any], scale: str) -> Experiment:
        """What is drawn, at a scale.

        `logit_spread` s is logit_scale = s·√(128 / d): embeddings whose rows have one root mean square at all widths d
        then give first logits of one spread. `trained_params` sets a network's hidden_dim, as `width_of` finds it.

        Raises:
            ConfigError: it is no experiment.
        """
        point: dict[str, Any] = {}
        for layer in (*self.layers[scale], _by_parameter(drawn)):
            point |= layer
        spread, parameters = point.pop("logit_spread", None), point.pop("trained_params", None)
        e = Experiment.from_mapping(point)
        if spread is not None:
            point["logit_scale"] = spread * math.sqrt(128 / e.embed_dim)
        if parameters is not None and e.model not in BODIES:
            raise ConfigError(f"trained_params: model = {e.model!r} has no hidden_dim to set: leave it out")
        if parameters is not None:
            point["hidden_dim"] = width_of(e, parameters)
        e = Experiment.from_mapping(point)
        e.check_read({*_by_parameter(drawn)} - {"logit_spread", "trained_params"})
        return e

    @cached_property
    def studies(self) -> list[optuna.Study]:
        """Optuna's, from the journal, one a turn: TPE would take the better turn's trials alone for good ones.

        Raises:
            ConfigError: the journal is of another search.
        """
        self.home.mkdir(parents=True, exist_ok=True)
        storage = JournalStorage(JournalFileBackend(str(self.home / "journal.log")))
        code = code_hash(self.experiment(self.first, "quick").model)
        asked = digest(json.dumps([self.layers["quick"], self.file.space, self.file.turns, self.file.seed]), code)
        studies, turns = [], len(self._ends(self.file.turns))
        for turn in range(turns):
            study = optuna.create_study(storage=storage, study_name=f"{self.name}, {turn}", load_if_exists=True)
            if study.trials and study.user_attrs["asked"] != asked:
                raise ConfigError(f"{self.home} is of another space or other code: move it away, and search anew")
            study.set_user_attr("asked", asked)
            seed = self.file.seed + turns * len(study.trials) + turn
            study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=-(-AT_RANDOM // turns))
            studies.append(study)
        return studies

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Those of any turn in one of the states."""
        return [trial for study in self.studies for trial in study.get_trials(states=states)]

    def turn(self, trial: Trial | FrozenTrial) -> int:
        """Which turn's a trial is."""
        return self._ends(self.file.turns).index(trial.user_attrs["drawn"][self.file.turns])

    def number(self, trial: Trial | FrozenTrial) -> int:
        """A trial's among those of all turns."""
        return trial.number * len(self.studies) + self.turn(trial)

    @property
    def left(self) -> int:
        """Trials that have not ended yet."""
        return max(0, self.file.trials - len(self.trials(*ENDED)))

    def carry_out(self, jobs: int) -> None:
        """Run the trials that are left, so many at a time: first those that were stopped, on from their checkpoints.

        Raises:
            ConfigError: as `run_apart`.
        """
        print(f"{self.name}: {self.left} of {self.file.trials} trials left, some minutes each", flush=True)
        # what is still running in the journal is of a process that was killed; some before it had drawn
        stopped = [trial for trial in self.trials(TrialState.RUNNING) if trial.user_attrs]
        with ThreadPoolExecutor(jobs) as pool:
            trials = [pool.submit(self.trial, trial) for trial in [*stopped, *[None] * self.left][: self.left]]
            try:
                for trial in as_completed(trials):
                    trial.result()
            except KeyboardInterrupt:  # of the runs, too: none of them has failed
                self.interrupted = True
                raise
            finally:
                pool.shutdown(cancel_futures=True)  # after a fault, what waits is not begun
        self.write_trials()

    def trial(self, stopped: FrozenTrial | None) -> None:
        """Run a trial and tell the study its held-out loss, nats, or that it does not learn.

        Raises:
            ConfigError: as `run_apart`.
        """
        trial = stopped or self.draw()
        study = self.studies[self.turn(trial)]
        try:
            metrics = self.run(self.number(trial), trial.user_attrs["drawn"], "quick")
        except ConfigError:
            if stopped and not self.interrupted:  # what fails twice is given up
                study.tell(trial.number, state=TrialState.FAIL)
            raise
        value = metrics.get("val_loss")
        study.tell(trial.number, value, None if metrics else TrialState.PRUNED)
        best = min((other.value for other in self.trials(TrialState.COMPLETE)), default=math.nan)
        shown = f"{value:.4f} nats" if metrics else "does not learn"
        print(f"{self.name}, trial {self.number(trial)}: {shown}, best {best:.4f}, {self.left} left", flush=True)

    def draw(self) -> Trial:
        """A new trial of the turn that has the fewest, numbers of a range to three digits."""
        with self.drawing:  # other threads draw, too
            known = self.trials(*ENDED, TrialState.RUNNING)
            turns = [self.turn(trial) for trial in known if trial.user_attrs]  # else it is lost
            turn = min(range(len(self.studies)), key=turns.count)
            trial, drawn = self.studies[turn].ask(), {}
            for line, given in self.file.space.items():
                if line == self.file.turns:
                    drawn[line] = self._ends(line)[turn]
                elif isinstance(given, dict):
                    value = float(f"{trial.suggest_float(line, **given):.3g}")
                    low, high = self._ends(line)
                    drawn[line] = min(max(value, low), high)
                else:
                    drawn[line] = given[trial.suggest_categorical(line, range(len(given)))]
            trial.set_user_attr("drawn", drawn)
        return trial

    def carry_out_full(self, top: int, jobs: int) -> None:
        """Run the table's best trials at full size, and add them to it: also where another machine has searched.

        Raises:
            ConfigError: the search is not over; or as `run_apart`.
        """
        table = pd.read_csv(self.table) if self.table.exists() else pd.DataFrame(columns=["scale"])
        trials = table[table["scale"] == "quick"]
        if len(trials) < self.file.trials:
            left = self.file.trials - len(trials)
            raise ConfigError(f"{left} of {self.file.trials} trials are not over: search without --top first")
        best = trials.dropna(subset="value").nsmallest(top, "value")
        drawn, rows = best[[*_by_parameter(self.first)]].to_dict("records"), []
        with ThreadPoolExecutor(jobs) as pool:
            runs = pool.map(lambda number, point: self.run(number, point, "full"), best["trial"], drawn)
            for number, point, metrics in zip(best["trial"], drawn, runs, strict=True):
                loss = metrics.get("development_loss")
                print(f"{self.name}, full {number}: {loss}", flush=True)
                rows.append(_row("full", number, loss, point, metrics.get("total_seconds")))
        self.write("full", rows)

    def run(self, number: int, drawn: Mapping[str, Any], scale: str) -> dict[str, Any]:
        """What a trial has drawn, at a scale: as `run_apart`."""
        return run_apart(self.experiment(drawn, scale), self.folder(number, scale))

    def folder(self, number: int, scale: str) -> Path:
        """Where a trial's run at a scale is."""
        return self.home / f"{scale}-{number:03d}"

    def write_trials(self) -> None:
        """Write all trials that have ended."""
        rows = []
        for trial in self.trials(*ENDED):
            done = self.folder(number := self.number(trial), "quick") / "metrics.json"
            seconds = json.loads(done.read_bytes())["total_seconds"] if done.exists() else None
            rows.append(_row("quick", number, trial.value, _by_parameter(trial.user_attrs["drawn"]), seconds))
        self.write("quick", rows)

    def write(self, scale: str, rows: list[dict[str, Any]]) -> None:
        """Write the rows of a scale into `data/search/<name>.csv`, in place of those that it had."""
        table = pd.DataFrame(rows)
        if self.table.exists():
            before = pd.read_csv(self.table)
            table = pd.concat([before[before["scale"] != scale], table])
        table = table.sort_values(["scale", "trial"], ascending=[False, True])
        with atomic(self.table) as path:
            table.to_csv(path, index=False, float_format="%.6g")


def _row(
    scale: str, number: int, loss: float | None, drawn: Mapping[str, Any], seconds: float | None
) -> dict[str, Any]:
    """A row of a search's table: its loss (nats) and perplexity are on held-out training text, or on development."""
    known = loss is not None
    row = {"scale": scale, "trial": number, "value": loss, "ppl": math.exp(loss) if known else None, **drawn}
    return row | {"seconds": seconds, "state": "finished" if known else "failed"}


def _by_parameter(drawn: Mapping[str, Any]) -> dict[str, Any]:
    """What is drawn, line → value (or values), by parameter."""
    return next(sweep({line: [value] for line, value in drawn.items()}))


def width_of(e: Experiment, parameters: int) -> int:
    """The hidden_dim that gives a network most nearly so many trained parameters, embedding and output bias apart.

    They are a quadratic of the width, which three narrow networks fix; a Transformer's divides among its heads.
    """
    step = e.num_heads if e.model == "transformer" else 1

    def count(width: int) -> int:
        with torch.device("meta"):  # shapes alone
            return sum(p.numel() for p in BODIES[e.model](e.model_copy(update={"hidden_dim": width})).parameters())

    widths = [step * k for k in (4, 8, 12)]
    a, b, c = np.polyfit(widths, [count(width) for width in widths], 2)
    width = (-b + math.sqrt(b * b - 4 * a * (c - parameters))) / (2 * a)
    return max(1, round(width / step)) * step


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="params/search/<name>.yaml")
    parser.add_argument("--top", type=int, default=0, help="run so many of the best trials at full size instead")
    parser.add_argument("--jobs", type=int, default=len(visible_gpus()) or available_cpu_count(), help="runs at a time")
    options = parser.parse_args(arguments)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        search = Search(options.file)
        if not take(search.home / ".lock"):
            raise ConfigError(f"another process is at search {search.name}: wait for it")
        if options.top > 0:
            search.carry_out_full(options.top, options.jobs)
        else:
            search.carry_out(options.jobs)
    except (ConfigError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
