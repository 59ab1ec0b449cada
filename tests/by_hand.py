"""The headline numbers once more, by hand: from the published tables, with NumPy, SciPy and pandas alone.

Written from docs/method.md, docs/results.md and the grids' files; shares no code with `ctxlm`, so that
`test_prose.py` can hold what the pages show against it. `python tests/by_hand.py` prints the numbers.

What is compared is the mean loss, nats a token of the test text. A replicate is a triple of seed, training text and
signs; both sides of a difference are of one triple. Replicates and conversations are two crossed random factors:

    difference = mean + replicate + conversation + rest.

A mean loss is a ratio, so every conversation enters as its jackknife pseudo-value (Tukey 1958). An analysis of variance
of these, [replicates, conversations], gives the three variance components (negative ones count as zero), from them the
variance of the mean, and Satterthwaite's (1946) degrees of freedom for Student's interval. Where the interval over
replicates alone is wider, it is taken.
"""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import optimize, stats

RESULTS = Path(__file__).resolve().parents[1] / "data" / "results"
DRAWN = ("seed", "data_seed", "embedding_seed")
ALIKE = ("protocol", "dtype", "corpus")
"""In what runs must not differ, beside the text that they are judged on; those of a pair nor in the embedding."""


class Run(NamedTuple):
    metrics: pd.Series
    """Its row of runs.csv."""
    samples: pd.DataFrame
    """loss_sum and tokens by sample."""


Side = dict[tuple[int, ...], Run]
"""Runs of one cell of a grid by their replicates."""


@cache
def tables(grid: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A grid's runs, and their losses by run, part and sample."""
    folder = RESULTS / grid
    samples = pd.read_parquet(folder / "samples.parquet").astype({"run": str, "tokens": int})
    return pd.read_csv(folder / "runs.csv", index_col="run"), samples.set_index(["run", "part", "sample"]).sort_index()


def read(grid: str, part: str = "test", **wanted) -> Side:
    """The finished runs of a grid with these values in runs.csv, and their losses on a judged part."""
    runs, samples = tables(grid)
    side: Side = {}
    alike = [runs[name].isna() if value is None else runs[name] == value for name, value in wanted.items()]
    for run, metrics in runs[np.all(alike, axis=0)].iterrows():
        replicate = tuple(metrics[name] for name in DRAWN)
        if replicate in side:
            raise ValueError(f"grid {grid} has two runs of replicate {replicate} with {wanted}")
        side[replicate] = Run(metrics, samples.loc[run, part])
    return side


def by_sample(*pairs: tuple[Side, Side]) -> tuple[np.ndarray, np.ndarray]:
    """Loss sums of the first sides less the second ones', [replicates, samples], and the samples' tokens.

    Of several pairs the mean, over replicates that have all of them.
    """
    sides = [side for pair in pairs for side in pair]
    replicates = sorted(set.intersection(*map(set, sides)))
    used = [side[replicate] for side in sides for replicate in replicates]
    if not used:
        raise ValueError("no replicate has all sides")
    tokens = used[0].samples["tokens"]
    if not all(run.samples["tokens"].equals(tokens) for run in used):
        raise ValueError("runs were judged on different texts")
    if any(run.metrics[name] != used[0].metrics[name] for run in used for name in ALIKE):
        raise ValueError(f"runs differ in one of {', '.join(ALIKE)}")
    if any(len({side[r].metrics["embedding"] for side in pair for r in replicates}) > 1 for pair in pairs):
        raise ValueError("runs of a pair differ in embedding")
    sums = [[a[r].samples["loss_sum"] - b[r].samples["loss_sum"] for r in replicates] for a, b in pairs]
    return np.mean(sums, axis=0), tokens.to_numpy(float)


def mean_squares(sums: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Of replicates, conversations and the rest: of the mean loss's pseudo-values, a conversation left out in turn."""
    m, n = sums.shape
    whole = sums.sum(1, keepdims=True)
    pseudo = n * whole / tokens.sum() - (n - 1) * (whole - sums) / (tokens.sum() - tokens)
    rows, columns, grand = pseudo.mean(1, keepdims=True), pseudo.mean(0), pseudo.mean()
    squares = n * ((rows - grand) ** 2).sum(), m * ((columns - grand) ** 2).sum()
    rest = ((pseudo - rows - columns + grand) ** 2).sum()
    return np.array([squares[0] / (m - 1), squares[1] / (n - 1), rest / (m - 1) / (n - 1)])


def interval(sums: np.ndarray, tokens: np.ndarray) -> tuple[float, float, float]:
    """Mean of `sums` / `tokens`, nats a token, and its interval over replicates and conversations."""
    m, n = sums.shape
    mean = sums.sum() / m / tokens.sum()
    if m == 1:
        return mean, np.nan, np.nan
    replicate, conversation, rest = mean_squares(sums, tokens)
    # m n times the mean's variance is a sum of mean squares: replicate + conversation − rest. A factor whose mean
    # square is below the rest's adds nothing to it; as much as the rest is then known from replicates alone.
    parts = np.array([replicate, conversation, -rest])
    if replicate < rest:
        parts = np.array([rest, max(conversation - rest, 0), 0])
    elif conversation < rest:
        parts = np.array([replicate, 0, 0])
    dof = parts.sum() ** 2 / (parts**2 / [m - 1, n - 1, (m - 1) * (n - 1)]).sum()
    half = stats.t.ppf(0.975, dof) * np.sqrt(parts.sum() / m / n)
    alone = stats.ttest_1samp(sums.sum(1) / tokens.sum(), 0).confidence_interval()  # over replicates: if it is wider
    half = max(half, (alone.high - alone.low) / 2)
    return mean, mean - half, mean + half


def over_sites(values: np.ndarray, errors: np.ndarray) -> tuple[float, float, float]:
    """Mean of sites by random effects, and its interval: Paule & Mandel (1982), Hartung & Knapp (2001)."""
    k = len(values)

    def weighted(between: float) -> tuple[float, float, float]:
        weights = 1 / (errors**2 + between)
        mean = (weights * values).sum() / weights.sum()
        return mean, (weights * (values - mean) ** 2).sum() / (k - 1), weights.sum()

    between = 0.0
    if weighted(0.0)[1] > 1:
        between = optimize.brentq(lambda t: weighted(t)[1] - 1, 0, values.var() * k, xtol=1e-14)
    mean, excess, weight = weighted(between)
    half = stats.t.ppf(0.975, k - 1) * np.sqrt(max(excess, 1) / weight)  # sites that agree know no more than each
    return mean, mean - half, mean + half


SMALL, LARGE, QUICK = 86_925, 183_620, 20_000
"""Training tokens."""
Cell = tuple[str, dict]
"""A grid, and what its runs that are meant have in runs.csv."""
Pairs = list[tuple[Cell, Cell]]
"""What is compared; of several pairs the mean counts."""


def contrast(size: int, a: str, b: str) -> Pairs:
    """Of two experiments, each given as grid/label."""
    first, second = ((grid, {"experiment": x, "train_tokens": size}) for grid, x in (a.split("/"), b.split("/")))
    return [(first, second)]


def shapes(*places: Cell) -> Pairs:
    """A − B in each of these places."""
    return [((grid, {"experiment": "A"} | at), (grid, {"experiment": "B"} | at)) for grid, at in places]


def pooled(grid: str, column: str, a: int, b: int) -> Pairs:
    """Two values of a column, at all widths or at all layers."""
    over, places = {"context_dim": ("num_layers", (1, 2, 3, 6)), "num_layers": ("context_dim", (128, 256))}[column]
    each = [{over: place} for place in places]
    return [((grid, at | {column: a}), (grid, at | {column: b})) for at in each]


CONTRASTS = {
    "04_scaling: A − B @ 86,925 tokens": contrast(SMALL, "stabilised/A", "stabilised/B"),
    "04_scaling: A − B @ 183,620 tokens": contrast(LARGE, "stabilised/A", "stabilised/B"),
    "04_as_studied: A − B @ 86,925 tokens": contrast(SMALL, "study/A", "study/B"),
    "04_as_studied: A − B @ 183,620 tokens": contrast(LARGE, "study/A", "study/B"),
    "04_quick_scale: A − B @ 20,000 tokens": contrast(QUICK, "stabilised-variance/A", "stabilised-variance/B"),
    "04_chance: stabilised − study @ A, 86,925 tokens": contrast(SMALL, "stabilised/A", "study/A"),
    "04_chance: stabilised − study @ B, 86,925 tokens": contrast(SMALL, "stabilised/B", "study/B"),
    "04_chance: A − B, float32 @ 0.002": contrast(QUICK, "dtype/A", "dtype/B"),
    "06_contexts: zeros, study, full size @ A": contrast(SMALL, "ablations-full/A-zero", "study/A"),
    "06_contexts: zeros, study, full size @ B": contrast(SMALL, "ablations-full/B-zero", "study/B"),
    "06_contexts: 2 layers − 6 layers, each at its best @ 20,000 tokens": contrast(
        QUICK, "depth-best/L2", "depth-best/L6"
    ),
    "06_contexts: 2 layers − 6 layers, searched, each at its best @ 20,000 tokens": contrast(
        QUICK, "depth-best/L2.A", "depth-best/L6.A"
    ),
    "06_contexts: 2 layers 2.5 times as wide − 6 layers @ 20,000 tokens": contrast(
        QUICK, "depth-best/L2-C328", "depth-best/L6"
    ),
    "06_contexts: 2 layers 2.5 times as wide − 6 layers, searched @ 20,000 tokens": contrast(
        QUICK, "depth-best/L2.A-C320", "depth-best/L6.A"
    ),
    "06_contexts: context 256 − 128 @ ": pooled("depth", "context_dim", 256, 128),
    "06_contexts: 1 layer − 6 layers @ ": pooled("depth", "num_layers", 1, 6),
    "06_contexts: 2 layers − 6 layers @ ": pooled("depth", "num_layers", 2, 6),
    "07_alternatives: A, searched − A, stabilised @ 20,000 tokens": contrast(
        QUICK, "searched-quick/A", "depth-best/L6"
    ),
    "07_alternatives: A, tuned − A, searched @ 20,000 tokens": contrast(
        QUICK, "searched-quick/tuned", "searched-quick/A"
    ),
    "07_alternatives: A, tuned − A, stabilised @ 20,000 tokens": contrast(
        QUICK, "searched-quick/tuned", "depth-best/L6"
    ),
    "07_alternatives: contexts frozen − A @ ": contrast(QUICK, "searched-lines/contexts-frozen", "searched-quick/A"),
    "07_alternatives: embedding frozen − A @ ": contrast(QUICK, "searched-lines/embedding-frozen", "searched-quick/A"),
    "07_alternatives: LSTM − A, each by its own search @ 20,000 tokens": contrast(
        QUICK, "searched-quick/LSTM", "searched-quick/A"
    ),
    "07_alternatives: minGRU − A, each by its own search @ 20,000 tokens": contrast(
        QUICK, "searched-quick/minGRU", "searched-quick/A"
    ),
    "07_alternatives: A − B, each by its own search @ 20,000 tokens": contrast(
        QUICK, "searched-quick/A", "searched-quick/B"
    ),
    "07_alternatives: A − B, each by its own narrower search @ 20,000 tokens": contrast(
        QUICK, "fair-quick/A", "fair-quick/B"
    ),
    "07_alternatives: Transformer − A, each by its own search @ 20,000 tokens": contrast(
        QUICK, "searched-quick/Transformer", "searched-quick/A"
    ),
    "07_alternatives: KN-4 − stabilised A @ 183,620 tokens": contrast(LARGE, "baselines/KN-4", "stabilised/A"),
} | {
    f"06_contexts: zeros, stabilised, full size @ {x}": [
        (
            ("sites-zeros", {"experiment": x, "corpus": "chitchat", "embedding": "ppmi"}),
            ("stabilised", {"experiment": x, "train_tokens": SMALL}),
        )
    ]
    for x in "AB"
}
"""By the page that shows it."""


def site(text: str, embedding: str, recipe: str = "stabilised", size: int = SMALL) -> Cell:
    """Where a site's runs are: conversations through PPMI have the grids of the study."""
    grids = {"stabilised": "sites" if size == SMALL else "sites-large", "study": "sites-study"}
    grid = recipe if (text, embedding) == ("chitchat", "ppmi") else grids[recipe]
    return grid, {"corpus": text, "embedding": embedding, "train_tokens": size}


TEXTS = {"chitchat": "conversations", "sotu": "speeches", "docstrings": "technical text"}
EMBEDDINGS = {"ppmi": "PPMI", "smollm2": "SmolLM2"}
SITES = {
    f"04_sites: A − B @ {words}, {through}": shapes(site(text, embedding))
    for text, words in TEXTS.items()
    for embedding, through in EMBEDDINGS.items()
}
PLACES = {words: [site(text, e) for e in EMBEDDINGS] for text, words in TEXTS.items()}
PLACES |= {"user prompts": [("prompts", {"embedding": e, "train_sample_tokens": None}) for e in EMBEDDINGS]}
TEXTWISE = {f"04_sites: A − B, both embeddings @ {text}": shapes(*places) for text, places in PLACES.items()}
TWICE = {
    f"04_sites: A − B, stabilised @ {TEXTS[text]}, {EMBEDDINGS[embedding]}, 183,620 tokens": shapes(
        site(text, embedding, size=LARGE)
    )
    for text, embedding in [("chitchat", "ppmi"), *((text, "smollm2") for text in TEXTS)]
}
SHIFTS = {
    name.replace("A − B, stabilised", "shift of A − B, twice the text").removesuffix(", 183,620 tokens"): [
        *larger,
        *((b, a) for a, b in SITES[name.replace(", stabilised", "").removesuffix(", 183,620 tokens")]),
    ]
    for name, larger in TWICE.items()
}
STUDIED = {
    f"04_sites: A − B, as the study trains @ {words}, {through}, 86,925 tokens": shapes(site(text, embedding, "study"))
    for text, words in TEXTS.items()
    for embedding, through in EMBEDDINGS.items()
}
RECIPE = {
    f"04_sites: stabilised − study @ {x}, {words}, {through}": [
        tuple((grid, at | {"experiment": x}) for grid, at in (site(text, e, r) for r in ("stabilised", "study")))
    ]
    for x in "AB"
    for text, words in TEXTS.items()
    for e, through in EMBEDDINGS.items()
}
RECIPE |= {
    f"04_sites: stabilised − study, both embeddings @ {x}, {words}": [
        pair for name, pairs in RECIPE.items() if f"@ {x}, {words}, " in name for pair in pairs
    ]
    for x in "AB"
    for words in TEXTS.values()
}
PROMPTS = "prompts", {"corpus": "prompts", "embedding": "smollm2", "train_sample_tokens": None}
OTHERS = {
    "04_sites: A − B @ user prompts, SmolLM2": shapes(PROMPTS),
    "04_what_decides: A − B @ user prompts, in pieces, SmolLM2": shapes(("prompts-order", {"train_piece_tokens": 256})),
}
OTHERS |= {
    f"04_what_decides: A − B @ user prompts{size}, as studied, SmolLM2": shapes(
        ("prompts-study", {"train_tokens": tokens, "phase2_shuffle": False})
    )
    for size, tokens in {"": SMALL, ", twice the text": LARGE}.items()
}
ORDERS = {
    "conversations": ("shuffled", "chitchat", ("sites", {"corpus": "chitchat", "embedding": "smollm2"})),
    "speeches": ("shuffled-sites", "sotu", ("sites", {"corpus": "sotu", "embedding": "smollm2"})),
    "technical text": ("shuffled-sites", "docstrings", ("sites", {"corpus": "docstrings", "embedding": "smollm2"})),
    "user prompts": ("shuffled", "prompts", PROMPTS),
}
"""By text, through SmolLM2, the runs in random and in text order."""
for text, (grid, corpus, (plain, at)) in ORDERS.items():
    at_random = {"corpus": corpus}
    OTHERS[f"04_sites: A − B @ {text}, random order, SmolLM2"] = shapes((grid, at_random))
    for x in "AB":  # what random order is worth to a shape
        pair = (grid, {"experiment": x} | at_random), (plain, {"experiment": x} | at)
        OTHERS[f"04_what_decides: random − text order @ {x}, {text}, SmolLM2"] = [pair]
AGAIN = {
    name.replace("04_sites", "04_what_decides").replace(" @", ", development @"): pairs
    for name, pairs in (TEXTWISE | OTHERS).items()
    if "both embeddings" in name or "random" in name
}
"""The same on other judged text."""
AT_RANDOM = [name for name in OTHERS if "A − B" in name and "random order" in name]
EVERY = CONTRASTS | SITES | TEXTWISE | TWICE | SHIFTS | STUDIED | RECIPE | OTHERS | AGAIN


def sums(name: str) -> tuple[np.ndarray, np.ndarray]:
    """As `by_sample`, of what is compared: the mean over its places, or of a shift one difference less another."""
    part = "development" if "development" in name else "test"
    by_place = [(read(grid, part, **a), read(other, part, **b)) for (grid, a), (other, b) in EVERY[name]]
    differences, tokens = by_sample(*by_place)
    return differences * (2 if name in SHIFTS else 1), tokens


if __name__ == "__main__":
    for name in EVERY:
        value, low, high = 100 * np.expm1(interval(*sums(name)))
        print(f"{name:64} {value:+7.2f} %  ({low:+7.2f} to {high:+7.2f})")
