"""The audit of a published study: what it claims, and the expressions that recompute it, are rows of its `audit.csv`.

A study is a folder of tables, copied as printed. The columns of its `audit.csv`:

- claim_id, section, claim, why: words. `{name}` in them is a column of the table that `each` names.
- each: empty, or a table. The row then makes a claim of every row of it, whose columns are names in its expressions.
- published: an expression for what is printed; empty where the claim is a statement without a number.
- recomputed: an expression for what the tables give; empty where they give nothing.
- testable: empty, or what stands in the way of testing the claim.

Every other table of the folder is a function of its name: `results('A', 86925, 'val_ppl')` is the cell of the row with
these values in those of `KEYS` that the table has, in that order. With fewer values it is the column of all rows that
have them. `log`, `exp`, `min`, `max`, `mean`, `sum` and `span` work on numbers and columns; `least` takes the
smallest of several columns, row by row. `slope`, `intercept`, `r2` and `law(…, tokens)` are of the line through log PPL
against log tokens of an experiment's `results`. `layers(n)` is the column 1 .. n.
"""

import ast
import math
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from simpleeval import DEFAULT_OPERATORS, SimpleEval

from ctxlm.config import ConfigError
from ctxlm.files import resolve

KEYS = ["experiment", "train_tokens", "epoch", "parameter", "item", "claim"]
"""Columns that name a row."""
COLUMNS = ["claim_id", "section", "each", "claim", "published", "recomputed", "testable", "why"]
ROUNDING = 0.01
"""A value that misses its printed digits by at most this share counts as rounding."""
VERDICTS = HOLDS, ROUNDED, FALSE, UNTESTABLE = "holds", "rounding", "does not follow", "cannot be tested"


class Cell(float):
    """A number that remembers how it was printed: `text`, and its decimals (1.54e5 has −3: three digits are 0)."""

    def __new__(cls, text: str) -> "Cell":
        self = super().__new__(cls, text)
        self.text, self.decimals = text, -Decimal(text).as_tuple().exponent
        return self

    def __str__(self) -> str:
        return self.text


def audit(folder: str | Path) -> pd.DataFrame:
    """One row a claim: claim_id, section, claim, published, recomputed, difference, verdict, why.

    `published` is text as printed. `recomputed` is a number at full precision, or text: of a statement, or what stands
    in the way of testing it. `difference` is recomputed / published − 1, where both are numbers.

    Args:
        folder: of the study's tables; relative to the repository.

    Raises:
        ConfigError: an expression is malformed, or refers to a cell that is not there.
    """
    paths, file = sorted(resolve(folder).glob("*.csv")), Path(folder) / "audit.csv"
    tables = {path.stem: pd.read_csv(path, dtype=str, keep_default_na=False) for path in paths}
    claims, checked = tables.pop("audit", pd.DataFrame()), []
    if missing := [name for name in COLUMNS if name not in claims]:
        raise ConfigError(f"{file} is missing or has no column {missing[0]}")
    functions = FUNCTIONS | {name: _look_up(name, table) for name, table in tables.items()}
    functions |= _laws(functions)
    for claim in claims.to_dict("records"):
        try:
            rows = tables[claim["each"]].to_dict("records") if claim["each"] else [{}]
            checked += [_row(claim, {name: _cell(text) for name, text in row.items()}, functions) for row in rows]
        except Exception as error:  # a typing error can raise nearly anything
            message = " ".join(f"{type(error).__name__}: {error}".split())
            expressions = ", ".join(f"`{claim[name]}`" for name in ("each", "published", "recomputed") if claim[name])
            place, remedy = f"{file}, claim {claim['claim_id']}", "correct this row, or the table that it names"
            raise ConfigError(f"{place}: {expressions} cannot be evaluated ({message}): {remedy}") from None
    return pd.DataFrame(checked)


def verdict(published: Any, recomputed: Any, testable: str = "") -> str:
    """What a recomputed number, column or statement says about what is printed; `testable` as in `audit.csv`.

    A printed range, as 82-83, holds a column whose values, rounded as its ends are, lie in it. A statement that the
    tables contradict does not follow, even where they could not confirm it.
    """
    if isinstance(recomputed, str) and recomputed != published:
        return FALSE
    if testable:
        return UNTESTABLE
    if isinstance(recomputed, str):
        return HOLDS
    if isinstance(recomputed, np.ndarray):
        low, high = map(Cell, published.split("-"))
        inside = low <= round(recomputed.min(), low.decimals) and round(recomputed.max(), high.decimals) <= high
        return HOLDS if inside else FALSE
    if math.isclose(round(recomputed, published.decimals), published, abs_tol=1e-9):
        return HOLDS
    return ROUNDED if abs(recomputed - published) <= ROUNDING * abs(published) else FALSE


def off(claim: pd.Series) -> str:
    """By how much a claim of `audit` is off, in words: per cent of what is printed; of a percentage, points."""
    if pd.isna(claim["difference"]):
        return ""
    points, share = claim["recomputed"] - float(claim["published"]), 100 * claim["difference"]
    return (f"{points:+.2g} points" if "%" in claim["claim"] else f"{share:+.1f} %").replace("-", "−")


def _row(claim: dict[str, str], names: dict[str, Any], functions: dict[str, Callable]) -> dict[str, Any]:
    expressions = SimpleEval(OPERATORS, functions, names)
    with np.errstate(all="ignore"):  # what is not finite does not follow
        published = _cell(str(expressions.eval(claim["published"] or "''")))
        recomputed = expressions.eval(claim["recomputed"] or "None")
    if recomputed is None and not claim["testable"]:
        raise ValueError("`recomputed` is empty, and so is `testable`")
    judgement, difference = verdict(published, recomputed, claim["testable"]), None
    if recomputed is None:
        recomputed = claim["testable"]
    elif isinstance(recomputed, np.ndarray):
        recomputed = f"{recomputed.min():.1f}-{recomputed.max():.1f}"
    elif not isinstance(recomputed, str):
        recomputed = float(recomputed)
        difference = recomputed / float(published) - 1 if published else None
    row = {name: claim[name].format_map(names) for name in ("claim_id", "section", "claim")}
    row |= {"published": str(published), "recomputed": recomputed, "difference": difference, "verdict": judgement}
    return row | {"why": claim["why"].format_map(names)}


def _cell(text: str) -> Cell | str:
    try:
        return Cell(text) if Decimal(text).is_finite() else text
    except InvalidOperation:
        return text


def _look_up(name: str, table: pd.DataFrame) -> Callable[..., Any]:
    keys = [key for key in KEYS if key in table]

    def look_up(*where: Any) -> Cell | str | np.ndarray:
        *values, column = map(str, where)
        rows = table[(table[keys[: len(values)]] == values).all(axis=1)]
        one, cells = len(values) == len(keys), [_cell(text) for text in rows.get(column, ())]
        if not cells or "" in cells or (one and len(cells) > 1):
            raise LookupError(f"{name}.csv has no single {column} of {', '.join(values) or 'its rows'}")
        return cells[0] if one else np.array(cells, float)

    return look_up


def _laws(functions: dict[str, Callable]) -> dict[str, Callable[..., float]]:
    def fit(experiment: str) -> Any:
        return stats.linregress(*(np.log(functions["results"](experiment, c)) for c in ("train_tokens", "val_ppl")))

    return {
        "slope": lambda experiment: fit(experiment).slope,
        "intercept": lambda experiment: fit(experiment).intercept,
        "r2": lambda experiment: fit(experiment).rvalue ** 2,
        "law": lambda experiment, tokens: np.exp(fit(experiment).intercept) * tokens ** fit(experiment).slope,
    }


def _of_all(function: Callable) -> Callable[..., Any]:
    return lambda *values: function(np.hstack(values))


OPERATORS = DEFAULT_OPERATORS | {ast.Mult: np.multiply, ast.Pow: np.float_power}
"""numpy's take columns, too; simpleeval's refuse large numbers, since text and whole numbers can grow without end."""
FUNCTIONS = {name: _of_all(getattr(np, name)) for name in ("min", "max", "mean", "sum")}
FUNCTIONS |= {"log": np.log, "exp": np.exp, "span": _of_all(np.asarray)}
FUNCTIONS |= {"least": lambda *columns: np.minimum.reduce(columns), "layers": lambda n: np.arange(1, n + 1)}
