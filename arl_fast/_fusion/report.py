"""What fusion weights do on the held-out rows, cross-fitted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from .fit import Fit
from .formula import Formula
from .rows import Chunk, Rows

_BINS = 15  # of the calibration error


class Estimate(NamedTuple):
    """A mean over rows and its standard error."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:+.3g} ± {self.error:.2g}"


class Score(NamedTuple):
    """One prediction on held-out rows: cross-entropy in nats, accuracy and calibration error in [0, 1]."""

    nll: float
    accuracy: float
    calibration: float


@dataclass(frozen=True)
class FusionReport:
    """What the weights do on the held-out rows.

    Everything "after" is cross-fitted: no row is judged by weights that it helped to fit.

    Attributes:
        method: "branch" or "joint".
        names: of the modalities.
        rows: number of rows (positions, for dense logits; pairs of a row and a label, for task "multilabel")
            that have a target. Scores are means over these.
        fitted: [M] weights before the guard. A pool has M+1 of them, the fused prediction's first.
        errors: their standard errors, of log w for "branch", of w for "joint".
        weights: [M] or [M+1] weights after the guard.
        kept: how much of the fitted weights' differences the guard let pass, from 0 (weights 1) to 1.
        before, after: Score by prediction: "fused" and each modality. A branch after is the branch at its own
            temperature.
        nll_gain: plain minus weighted cross-entropy, paired by row.
        accuracy_gain: weighted minus plain accuracy, paired by row.
        ratio: smallest by largest accuracy of a branch.
        best: the modality whose branch has the highest accuracy.
        over_best: accuracy of the weighted whole minus that of the best branch, paired by row.
        plain_over_best: the same of the plain whole.
        present: set of modalities -> (rows, accuracy before, accuracy after): rows that have them, predicted
            from them alone. Linear heads only.
        passes: how often the rows were passed over.
    """

    method: str
    names: list[str]
    rows: int
    fitted: list[float]
    errors: list[float]
    weights: list[float]
    kept: float
    before: dict[str, Score]
    after: dict[str, Score]
    nll_gain: Estimate
    accuracy_gain: Estimate
    ratio: float
    best: str
    over_best: Estimate
    plain_over_best: Estimate
    present: dict[tuple[str, ...], tuple[int, float, float]]
    passes: int

    @property
    def verdict(self) -> str:
        """Whether the weights, and fusion itself, help here: two sentences."""
        if self.kept == 0:
            first = "The branches do not call for different weights: all stay as they were."
        else:
            first = f"Cross-fitted, the weights change accuracy by {_points(self.accuracy_gain)} points."
        mean, error = self.over_best
        if mean > 2 * error:
            return f"{first} Fusion helps: {_points(self.over_best)} points over {self.best} alone."
        if mean < -2 * error:
            against = f"{_points(self.over_best)} points against {self.best} alone"
            return f"{first} Fusion does not help: {against}. Use that branch."
        return (
            f"{first} Whether fusion helps is open: {_points(self.over_best)} points over {self.best} alone."
        )

    def __str__(self) -> str:
        weighted = self.names if len(self.weights) == len(self.names) else ["fused", *self.names]
        lines = [f"Fusion weights, method {self.method!r}, {self.rows} held-out rows, {self.passes} passes"]
        titles = f"{'weight':>8}{'fitted':>8}{'error':>8}{'NLL':>16}{'accuracy, %':>16}{'calibration, %':>18}"
        lines.append(f"  {'':<16}{titles}")
        for name, before in self.before.items():
            cells = f"{'':>24}"
            if name in weighted:
                i = weighted.index(name)
                cells = f"{self.weights[i]:>8.3f}{self.fitted[i]:>8.3f}{self.errors[i]:>8.3f}"
            after = self.after[name]
            nll = f"{before.nll:.3f} > {after.nll:.3f}"
            accuracy = f"{100 * before.accuracy:.1f} > {100 * after.accuracy:.1f}"
            calibration = f"{100 * before.calibration:.1f} > {100 * after.calibration:.1f}"
            lines.append(f"  {name:<16}{cells}{nll:>16}{accuracy:>16}{calibration:>18}")
        for names, (rows, before_, after_) in self.present.items():
            accuracy = f"{100 * before_:.1f} > {100 * after_:.1f} %"
            lines.append(f"  accuracy from {' + '.join(names)}: {accuracy} ({rows} rows)")
        kept = f"the guard kept {self.kept:.2f} of the weights' difference"
        lines.append(f"  r = {self.ratio:.2f} (smallest by largest accuracy of a branch); {kept}")
        return "\n".join([*lines, "  " + self.verdict])


def _points(estimate: Estimate) -> str:
    return f"{100 * estimate.mean:+.1f} ± {100 * estimate.error:.1f}"


class _Paired:
    """Mean of a difference over rows; its error takes samples, not their positions, for independent."""

    def __init__(self) -> None:
        self.sums = torch.zeros(6, dtype=torch.float64)

    def add(self, chunk: Chunk, difference: Tensor, size: Tensor) -> None:
        d, n = chunk.by_sample(difference * size), chunk.by_sample(size)
        self.sums += torch.stack(
            [d.sum(), n.sum(), (d * d).sum(), (d * n).sum(), (n * n).sum(), (n > 0).sum().double()]
        ).cpu()

    def estimate(self) -> Estimate:
        d, n, dd, dn, nn_, samples = self.sums.tolist()
        if n == 0:
            return Estimate(math.nan, math.nan)
        mean = d / n
        variance = max(dd - 2 * mean * dn + mean * mean * nn_, 0.0) / n**2 * samples / max(samples - 1, 1)
        return Estimate(mean, variance**0.5 if samples > 1 else math.inf)


class _Tally:
    """Score of one prediction, added up."""

    def __init__(self) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64)
        self.bins = torch.zeros(3, _BINS, dtype=torch.float64)

    def add(self, chunk: Chunk, logits: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """The rows' cross-entropy and whether they are right, [n]."""
        log_p = logits.log_softmax(1)
        loss = -(chunk.target * log_p).sum(1)
        top, guess = log_p.max(1)
        right = (guess == chunk.label).double()
        confidence = top.exp()
        self.sums += torch.stack(
            [(loss * valid).sum(), (chunk.size * valid).sum(), (right * valid).sum(), valid.sum()]
        ).cpu()
        bins = torch.nn.functional.one_hot((confidence * _BINS).long().clamp(max=_BINS - 1), _BINS).double()
        self.bins += torch.stack([valid @ bins, (valid * confidence) @ bins, (valid * right) @ bins]).cpu()
        return loss, right

    def score(self) -> Score:
        loss, size, right, rows = self.sums.tolist()
        if rows == 0:
            return Score(math.nan, math.nan, math.nan)
        gap = float((self.bins[1] - self.bins[2]).abs().sum())
        return Score(loss / size if size else math.nan, right / rows, gap / rows)


def make_report(formula: Formula, rows: Rows, fit: Fit, method: str) -> FusionReport:
    """One more pass: every row with the plain weights, and with those of the fit without its fold."""
    names = ["fused", *formula.names]
    before, after = {name: _Tally() for name in names}, {name: _Tally() for name in names}
    nll, accuracy = _Paired(), _Paired()
    over, plain_over = ([_Paired() for _ in formula.names] for _ in range(2))
    sets = _sets(formula)
    present = {chosen: torch.zeros(3, dtype=torch.float64) for chosen in sets}
    for chunk in rows:
        device = chunk.size.device
        plain = formula.plain.double().to(device)
        w = fit.weights.to(device)[chunk.fold]  # [n, K]
        t = fit.temperatures.T.to(device)[chunk.fold]
        own = chunk.branches[-len(formula.names) :]
        there = chunk.present[-len(formula.names) :]
        valid = chunk.valid
        plain_logits = chunk.base + torch.einsum("k,knc->nc", plain, chunk.designs)
        loss, right = before["fused"].add(chunk, plain_logits, valid)
        new_loss, new_right = after["fused"].add(
            chunk, chunk.base + torch.einsum("nk,knc->nc", w, chunk.designs), valid
        )
        nll.add(chunk, (loss - new_loss) / chunk.size.clamp_min(1e-300), chunk.size)
        accuracy.add(chunk, new_right - right, valid)
        for m, name in enumerate(formula.names):
            here = valid * there[m]
            _, alone = before[name].add(chunk, own[m], here)
            after[name].add(chunk, own[m] * t[:, -len(formula.names) + m, None], here)
            over[m].add(chunk, new_right - alone, here)
            plain_over[m].add(chunk, right - alone, here)
        for chosen in sets:
            pick = torch.zeros(len(plain), dtype=torch.float64, device=device)
            pick[list(chosen)] = 1
            here = valid * chunk.present[list(chosen)].prod(0)
            a = (chunk.base + torch.einsum("k,knc->nc", pick, chunk.designs)).argmax(1) == chunk.label
            b = (chunk.base + torch.einsum("nk,knc->nc", w * pick, chunk.designs)).argmax(1) == chunk.label
            present[chosen] += torch.stack([here.sum(), here @ a.double(), here @ b.double()]).cpu()
    scores, new_scores = ({name: tally.score() for name, tally in side.items()} for side in (before, after))
    alone_ = [scores[name].accuracy for name in formula.names]
    known = [a for a in alone_ if not math.isnan(a)]
    best = alone_.index(max(known))
    return FusionReport(
        method=method,
        names=formula.names,
        rows=int(before["fused"].sums[3]),
        fitted=fit.fitted[-1].tolist(),
        errors=fit.errors[-1].tolist(),
        weights=fit.weights[-1].tolist(),
        kept=float(fit.kept[-1]),
        before=scores,
        after=new_scores,
        nll_gain=nll.estimate(),
        accuracy_gain=accuracy.estimate(),
        ratio=min(known) / max(known) if max(known) > 0 else 1.0,
        best=formula.names[best],
        over_best=over[best].estimate(),
        plain_over_best=plain_over[best].estimate(),
        present={
            tuple(formula.names[m] for m in chosen): (int(n), a / n, b / n)
            for chosen, (n, a, b) in ((chosen, total.tolist()) for chosen, total in present.items())
            if n
        },
        passes=rows.passes,
    )


def _sets(formula: Formula) -> list[tuple[int, ...]]:
    """Sets of modalities to predict from: all sets of up to four, else single ones, all but one, the whole.

    A pool has no prediction from a part of the modalities beside the branches, which the report has anyway.
    """
    number = len(formula.names)
    if formula.pool:
        return []
    sizes = range(1, number + 1) if number <= 4 else (1, number - 1, number)
    return [chosen for size in sizes for chosen in combinations(range(number), size)]
