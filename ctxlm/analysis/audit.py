"""The study's claims, recomputed from its own tables: every number and every quantitative statement of its page.

`audit` reads nothing but the CSV files under `data/reference/`, so a changed cell changes the verdicts that hang on it.
"""

import math
from pathlib import Path

import pandas as pd

from ctxlm.analysis.scaling import PowerLaw, crossover, fit_power_law
from ctxlm.analysis.tables import REFERENCE
from ctxlm.files import atomic, resolve

EMBED_DIM = 768
"""Width of GPT-2's embedding, which the study's parameter counts imply and its page does not name."""
ROUNDING = 0.01
"""A value that misses its printed digits by at most this share counts as rounding."""
HOLDS, ROUNDED, FALSE, UNTESTABLE = "holds", "rounding", "does not follow", "cannot be tested"
VERDICTS = (HOLDS, ROUNDED, FALSE, UNTESTABLE)
SHORT = {"A": "A (deep and narrow)", "B": "B (shallow and wide)"}


def audit(folder: str | Path = REFERENCE) -> pd.DataFrame:
    """One row a claim: claim_id, section, claim, published, recomputed, difference, verdict, why.

    `published` is text as printed. `recomputed` is a number at full precision, or a sentence for a statement without
    a number. `difference` is recomputed / published − 1, where both are numbers. Verdicts: "holds" (the recomputed
    value rounds to what is printed), "rounding" (it is off by at most 1 %), "does not follow" (by more), "cannot be
    tested" (with the study's tables alone).
    """
    return pd.DataFrame(_Audit(resolve(folder)).rows())


def write_audit(claims: pd.DataFrame, folder: Path) -> Path:
    """Write what `audit` gives to `audit.csv` in `folder`, atomically."""
    with atomic(folder / "audit.csv") as temporary:
        claims.to_csv(temporary, index=False)
    return folder / "audit.csv"


class _Audit:
    """The tables, as printed text, and the claims made from them, section by section."""

    def __init__(self, folder: Path):
        def read(name: str) -> pd.DataFrame:
            return pd.read_csv(folder / f"{name}.csv", dtype=str)

        self.settings = read("settings").set_index("parameter")["value"]
        self.about = read("about").set_index("item")["value"]
        self.shapes = read("architectures").set_index("experiment")
        self.results, self.phase1, self.phase2 = (self._by_run(read(n)) for n in ("results", "phase1", "phase2"))
        self.laws = read("power_laws").set_index("experiment")
        self.predictions = self._by_run(read("power_law_predictions"))
        self.epochs = read("phase2_epochs")
        self.claims = read("claims")
        self.sizes = sorted({int(tokens) for _, tokens in self.results.index})
        self.found: list[dict] = []

    @staticmethod
    def _by_run(table: pd.DataFrame) -> pd.DataFrame:
        return table.set_index([table["experiment"], table["train_tokens"].astype(int)])

    def rows(self) -> list[dict]:
        for section, claims in (
            ("Settings", self._settings),
            ("Summary of results", self._summary),
            ("Power laws", self._power_laws),
            ("Interpretation", self._interpretation),
            ("Phase 1", self._phase1),
            ("Phase 2", self._phase2),
            ("Conclusions", self._conclusions),
        ):
            self.section = section
            claims()
        return self.found

    def _add(self, claim_id: str, claim: str, published: str, recomputed, why: str, verdict=None) -> None:
        """Append a claim; without `verdict`, the numbers decide."""
        difference = None
        if isinstance(recomputed, float):
            printed = float(published)
            difference = recomputed / printed - 1 if printed else None
            verdict = verdict or _verdict(published, recomputed)
        row = {"claim_id": claim_id, "section": self.section, "claim": claim, "published": published}
        self.found.append(row | {"recomputed": recomputed, "difference": difference, "verdict": verdict, "why": why})

    def _printed(self, claim: str) -> str:
        """The number of the one claim in claims.csv that begins with `claim`."""
        (value,) = self.claims.loc[self.claims["claim"].str.startswith(claim), "value"]
        return value

    def _ppl(self, label: str, tokens: int) -> float:
        return float(self.results.loc[(label, tokens), "val_ppl"])

    def _law(self, label: str, factor: float = 1.0) -> PowerLaw:
        """The line through a configuration's two points, with its PPL at the larger size multiplied by `factor`."""
        small, large = (self._ppl(label, size) for size in self.sizes)
        return fit_power_law(self.sizes, [small, factor * large])

    def _settings(self) -> None:
        n = int(self.settings["num_input_tokens"])
        for label, shape in self.shapes.iterrows():
            layers, c = int(shape["num_layers"]), int(shape["context_dim"])
            context = layers * (c * (c + n * EMBED_DIM) + 3 * c) / 1e6
            counted = layers * (EMBED_DIM * (c + n * EMBED_DIM) + 3 * EMBED_DIM) / 1e6
            trained = counted - (layers - 1) * EMBED_DIM * (n - 1) * EMBED_DIM / 1e6
            block, printed = f"of {SHORT[label]}, million parameters", "token_block_params"
            why = f"{layers} layers from {c} + {n}·{EMBED_DIM} to {c}, with biases and LayerNorms."
            millions = shape["context_block_params_millions"]
            self._add(f"parameters_context_{label}", f"ContextBlock {block}", millions, context, why)
            why = f"Only the first layer reads all {n} tokens; the others read the {EMBED_DIM} values before them."
            millions = shape[f"{printed}_trained_millions"]
            self._add(f"parameters_trained_{label}", f"Trained in Phase 2 {block}", millions, trained, why)
            why = f"The table counts every layer as if it read {n} tokens ({counted:.2f}); its own last column, what "
            why += "Phase 2 trains, is all the TokenBlock there is."
            millions = shape[f"{printed}_published_millions"]
            self._add(f"parameters_token_{label}", f"TokenBlock {block}", millions, trained, why)

    def _summary(self) -> None:
        minutes = 0.0
        for (label, tokens), row in self.results.iterrows():
            parts = float(row["phase1_minutes"]), float(row["phase2_minutes"])
            minutes += float(row["total_minutes"])
            why = f"Phase 1 and Phase 2 took {parts[0]:g} and {parts[1]:g} minutes."
            claim = f"Total minutes of {label} at {tokens:,} tokens"
            self._add(f"minutes_{label}_{tokens}", claim, row["total_minutes"], round(sum(parts), 6), why)
        hours = self.about["duration_hours"]
        why = f"The four runs add up to {minutes:.1f} minutes; the other {60 * float(hours) - minutes:.0f} are in no "
        why += "table, but what they do not count, as loading data, takes time too."
        more = float(hours) > minutes / 60 and _verdict(hours, minutes / 60) == FALSE
        verdict = UNTESTABLE if more else None
        self._add("duration", "Hours of the whole experiment", hours, minutes / 60, why, verdict)
        for tokens in self.sizes:
            accuracy = {label: float(self.results.loc[(label, tokens), "val_accuracy_pct"]) for label in "AB"}
            better = max(accuracy, key=accuracy.get)
            claim = f"B has the higher accuracy at {tokens:,} tokens (printed in bold)"
            why = f"A {accuracy['A']} %, B {accuracy['B']} %; the study's conclusions are drawn from PPL alone."
            self._add(f"accuracy_{tokens}", claim, "B", better, why, HOLDS if better == "B" else FALSE)

    def _power_laws(self) -> None:
        small, large = self.sizes
        for label, law in self.laws.iterrows():
            fitted = self._law(label)
            ppl = [self._ppl(label, size) for size in self.sizes]
            for column, name, values in (("log_ppl", "PPL", ppl), ("log_tokens", "tokens", self.sizes)):
                low, high = map(math.log, values)
                for place, what, value in (
                    ("small", f"log({name}) of {label} at {small:,} tokens", low),
                    ("large", f"log({name}) of {label} at {large:,} tokens", high),
                    ("change", f"Change of log({name}) of {label}", high - low),
                ):
                    why = "Natural logarithm." if place != "change" else "Of the unrounded logarithms."
                    self._add(f"{column}_{place}_{label}", what, law[f"{column}_{place}"], value, why)
            why = f"The line through two points, {ppl[0]} and {ppl[1]}; it has no residual degrees of freedom, so the "
            why += "exponent has no error that could be stated."
            self._add(f"exponent_{label}", f"Exponent α of {label}", law["alpha"], fitted.alpha, why)
            why = f"From unrounded logarithms; the printed one is exp({law['log_a']}), rounded to three decimals."
            self._add(f"coefficient_{label}", f"Coefficient A of {label}", law["a"], math.exp(fitted.log_a), why)
            for tokens in self.sizes:
                row, printed = self.predictions.loc[(label, tokens)], float(law["a"]) * tokens ** float(law["alpha"])
                claim = f"PPL of {label} at {tokens:,} tokens by the fitted law"
                why = f"The law as printed, {law['a']} · tokens^({law['alpha']})."
                self._add(f"prediction_{label}_{tokens}", claim, row["predicted_ppl"], printed, why)
            errors = ", ".join(self.predictions.loc[label, "error_pct"])
            claim = f"The law of {label} predicts with an error of 0.0 %"
            why = "A line through two points meets both whatever they are; only a third size could test it."
            self._add(f"accuracy_of_law_{label}", claim, errors, "two points, two parameters", why, UNTESTABLE)

    def _interpretation(self) -> None:
        small, large = self.sizes
        alpha = {label: self._law(label).alpha for label in "AB"}
        why = f"α is {alpha['A']:.3f} (A) and {alpha['B']:.3f} (B), each from two runs of one seed: two lines "
        why += "without an error."
        self._add("steeper", "B scales more efficiently than A", "B", min(alpha, key=alpha.get), why, UNTESTABLE)
        for label in "BA":
            gain = 100 * (1 - 2 ** alpha[label])
            step = 100 * (1 - self._ppl(label, large) / self._ppl(label, small))
            printed = self._printed(f"doubling the data improves {label}'s PPL by about")
            why = f"1 − 2^({alpha[label]:.3f}); even the {large / small:.2f} times more tokens of the second size "
            why += f"improved it by {step:.1f} % only."
            claim = f"Doubling the data improves {label}'s PPL by about (%)"
            self._add(f"doubling_{label}", claim, printed, gain, why)
        why = "The arithmetic; whether the gap would outlast another seed or other text than these "
        why += f"{self.settings['val_samples']} validation samples cannot be told from one run."
        for place, better, other, tokens, samples in (("small", *"AB", small, 500), ("large", *"BA", large, 1000)):
            printed = self._printed(f"at {samples} samples {better} is better by")
            gain = 100 * (1 - self._ppl(better, tokens) / self._ppl(other, tokens))
            self._add(f"better_at_{place}", f"{better} is better at {tokens:,} tokens by (%)", printed, gain, why)
        printed = {x: (float(self.laws.loc[x, "alpha"]), float(self.laws.loc[x, "a"])) for x in "AB"}
        slope, ratio = printed["A"][0] - printed["B"][0], printed["B"][1] / printed["A"][1]
        exponent = self._printed("difference of the two exponents")
        quotient = self._printed("ratio of the two intercepts")
        self._add("exponent_difference", "Difference of the exponents", exponent, slope, "As printed above it.")
        self._add("coefficient_ratio", "Ratio of the coefficients", quotient, ratio, "As printed above it.")
        own = float(quotient) ** (1 / float(exponent))
        exact, moved = (crossover(self._law("A"), self._law("B", factor)) for factor in (1.0, 1.01))
        if_higher = f"it would be {moved.tokens:,.0f}" if moved.tokens else moved.reason
        why = f"From the four PPLs; the study's own last line, {quotient}^(1/{exponent}), is {own:,.0f}. Were B's PPL "
        why += f"at {large:,} tokens 1 % higher, {if_higher}."
        printed, found = self._printed("the two PPLs cross at about"), exact.tokens or exact.reason
        self._add("crossover", "Tokens at which the laws cross", printed, found, why, None if exact.tokens else FALSE)
        for label in "AB":
            values = self.results.loc[label, ["train_er_pct", "val_er_pct"]].astype(float).to_numpy()
            low, high = self._printed(f"{label}'s effective rank").split("-")
            verdict = HOLDS if float(low) <= round(values.min()) and round(values.max()) <= float(high) else FALSE
            claim, ends = f"Effective rank of {label}, %", (values.min(), values.max())
            why = f"Training and validation, both sizes: {ends[0]} to {ends[1]} %."
            self._add(f"effective_rank_{label}", claim, f"{low}-{high}", f"{ends[0]}-{ends[1]}", why, verdict)

    def _phase1(self) -> None:
        for (label, tokens), row in self.phase1.iterrows():
            converged = int(row["phase1_converged_tokens"])
            claim, why = f"Tokens of {label} that converged at {tokens:,} tokens, %", f"{converged:,} of {tokens:,}."
            share = 100 * converged / tokens
            self._add(f"converged_{label}_{tokens}", claim, row["phase1_converged_pct"], share, why)

    def _phase2(self) -> None:
        for (label, tokens), row in self.phase2.iterrows():
            mine = self.epochs[(self.epochs["experiment"] == label) & (self.epochs["train_tokens"] == str(tokens))]
            ppl = mine.set_index(mine["epoch"].astype(int))["val_ppl"].astype(float).sort_index()
            best = int(row["best_epoch"])
            rate = 100 * (float(ppl.iloc[-1]) / float(ppl[best]) - 1)
            why = f"PPL {ppl.iloc[-1]} in epoch {ppl.index[-1]} over {ppl[best]} in epoch {best}."
            claim = f"Over-fitting of {label} at {tokens:,} tokens, %"
            self._add(f"overfitting_{label}_{tokens}", claim, row["overfit_pct"], rate, why)
        counts = self.epochs.groupby(["experiment", "train_tokens"])["epoch"].apply(lambda e: sorted(map(int, e)))
        last = max(map(max, counts))
        missing = sorted(set(range(1, last + 1)) - set(counts.iloc[0]))
        why = "Every epoch is printed."
        if missing:
            why = f"The tables leave out epochs {' and '.join(map(str, missing))}; of the printed ones, epoch 2 has "
            why += "the lower PPL in every run."
        claim, found = "Epoch 2 is the best of every run; epochs 3 and 4 over-fit", ", ".join(map(str, counts.iloc[0]))
        self._add("best_epoch", claim, "2", f"epochs printed: {found}", why, UNTESTABLE if missing else HOLDS)
        claim, rate = "The learning rate of Phase 2 may be too high", self.settings["phase2_learning_rate"]
        why = "All runs used the same one: nothing to compare it with."
        self._add("learning_rate", claim, rate, "one learning rate", why, UNTESTABLE)
        why = "The last printed epoch is the second after the best one, as the rule has it; that it saved anything "
        why += "cannot be seen, since training went no further."
        verdict = HOLDS if last == int(self.phase2["best_epoch"].iloc[0]) + 2 else FALSE
        claim = "Early stopping with a patience of 2 works as it should"
        self._add("early_stopping", claim, "2", f"last epoch {last}", why, verdict)

    def _conclusions(self) -> None:
        for claim_id, words, expected in (
            ("recommendation_small", "small data: A is preferable at about", "A"),
            ("recommendation_large", "large data: B is preferable above", "B"),
        ):
            tokens = float(self._printed(words))
            gain = 100 * (self._law("B").ppl(tokens) / self._law("A").ppl(tokens) - 1)
            better = "A" if gain > 0 else "B"
            claim = f"{SHORT[expected]} is preferable {'around' if expected == 'A' else 'above'} {tokens:,.0f} tokens"
            why, verdict = "a line between two sizes, one seed each, no error bars.", UNTESTABLE
            if better != expected:
                why, verdict = "the bound lies on the wrong side of their crossing.", FALSE
            why = f"By the study's own laws, PPL of B against A is {gain:+.1f} % at {tokens:,.0f} tokens: {why}"
            self._add(claim_id, claim, expected, better, why, verdict)
        claim = "Lowering the learning rate to 0.001 reduces over-fitting and allows more epochs"
        printed, why = self._printed("lower Phase 2's learning rate to"), "A proposal: no run of the study tried it."
        self._add("lower_learning_rate", claim, printed, "one learning rate", why, UNTESTABLE)


def _verdict(published: str, recomputed: float) -> str:
    """What a recomputed number says about a printed one."""
    decimals = len(published.partition(".")[2])
    if math.isclose(round(recomputed, decimals), float(published), abs_tol=1e-9):
        return HOLDS
    if abs(recomputed - float(published)) <= ROUNDING * abs(float(published)):
        return ROUNDED
    return FALSE
