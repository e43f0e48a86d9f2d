"""From held-out numbers to a recommendation. Training statistics never enter it."""

from __future__ import annotations

from typing import NamedTuple

from ..ladder import Difference, Results

EVEN = 0.75  # r from which on no rule and no weights mattered, in the studies behind docs/method.md
ADVICE = {
    "joint": "stay with joint cross-entropy",
    "unimodal": "add the unimodal losses: ARLLoss(rule='none')",
    "weights": "add the unimodal losses, ARLLoss(rule='none'), and FusionWeights from held-out rows",
    "constant": "add the unimodal losses and a constant gain, ARLLoss(rule='constant')",
    "share": "use ARL: ARLLoss()",
}


class Verdict(NamedTuple):
    """What a diagnosis comes to.

    Attributes:
        recommendation: the rung: "joint", "unimodal", "weights", "constant" or "share".
        advice: the same as a sentence.
        reasons: sentences, the most important first.
        r: smallest / largest held-out branch accuracy after training with unimodal losses.
        branches: held-out accuracy of each modality's branch, after training with unimodal losses. With
            several labels per row these two are macro F1: accuracy is high already where most answers are no.
        differences: accuracy of each rung minus joint training's, paired, with errors over seeds and rows.
    """

    recommendation: str
    advice: str
    reasons: list[str]
    r: float
    branches: dict[str, float]
    differences: dict[str, Difference]


def decide(results: Results) -> Verdict:
    """The simplest rung that no more elaborate one clearly beats, going up from joint training.

    "Clearly": 0 is outside the 95 % interval of the paired difference over seeds and held-out rows. Where the
    branches are even, r >= 0.75, only joint training and unimodal losses are compared.
    """
    what = "macro_f1" if results.several_labels else "accuracy"
    branches = {m: float(results.values("unimodal", m, what).mean()) for m in results.modalities}
    weakest, strongest = min(branches, key=lambda m: branches[m]), max(branches, key=lambda m: branches[m])
    r = branches[weakest] / branches[strongest] if branches[strongest] else 1.0
    even = r >= EVEN
    rungs = [name for name in ADVICE if name in results.chosen]
    differences = {
        name: results.difference_with_rows(name, "joint") for name in results.chosen if name != "joint"
    }

    chosen = "joint"
    for name in rungs[1:2] if even else rungs[1:]:
        over = results.difference_with_rows(name, chosen)
        if over.clear and over.mean > 0:
            chosen = name

    reasons = []
    if chosen == "joint":
        worse = [name for name in rungs[1:] if differences[name].clear and differences[name].mean < 0]
        text = "No rung is clearly better than joint training"
        reasons.append(
            f"{text}, and clearly worse: {_list(results, worse)}."
            if worse
            else f"{text}: the rest is within noise."
        )
    else:
        title = _name(results, chosen)
        title = title[0].upper() + title[1:]
        reasons.append(f"{title} against joint training: {_points(differences[chosen])}.")
        others = [name for name in rungs[rungs.index(chosen) + 1 :] if not even]
        if others:
            reasons.append(f"Not clearly better than that: {_list(results, others)}.")
        skipped = [name for name in rungs[1 : rungs.index(chosen)] if not _clear_gain(results, chosen, name)]
        if skipped:
            reasons.append(f"But it is not told apart from {_list(results, skipped)}, which is simpler.")
    unclear = [name for name, d in differences.items() if not d.clear and d.mean > 1.96 * d.error]
    if chosen == "joint" and unclear:
        shown = "; ".join(f"{_name(results, name)} {_points(differences[name])}" for name in unclear)
        reasons.append(f"More seeds may tell more, {len(results.seeds)} are too few to: {shown}.")
    if chosen == "weights":
        reasons.append(
            "The weights are fitted on the half of the held-out rows that learning rates are chosen on. "
            "Training on those rows as well is the alternative to compare with."
        )
    verb, place = ("reaches a macro F1 of", "on") if results.several_labels else ("predicts", "of")
    spread = f"{weakest} alone {verb} {_percent(branches[weakest])} {place} the held-out rows"
    spread += f", {strongest} {_percent(branches[strongest])}"
    if even:
        reasons.append(
            f"The branches are even, r = {r:.2f}: {spread}. In such cases no rule for the gains and no "
            "fusion weights mattered; more training rows did."
        )
    else:
        reasons.append(f"The branches are uneven, r = {r:.2f}: {spread}.")
    for m in results.modalities:
        d = results.difference("unimodal", "joint", m, what)
        if d.clear and d.mean > 0:
            before = float(results.values("joint", m, what).mean())
            reasons.append(
                f"Joint training leaves {m} undertrained: alone it {verb} {_percent(before)}, and "
                f"{_percent(branches[m])} after unimodal losses. That counts where a modality may be missing."
            )
    fused = float(results.values(chosen, what=what).mean())
    if branches[strongest] >= fused:
        reasons.append(
            f"Beware: {strongest} alone, after unimodal losses, {verb} {_percent(branches[strongest])}, "
            f"and all together {_percent(fused)}: the fusion adds nothing to it."
        )
    reasons += _memorised(results) + _at_the_edge(results, rungs)
    return Verdict(chosen, ADVICE[chosen], reasons, r, branches, differences)


def _clear_gain(results: Results, name: str, baseline: str) -> bool:
    d = results.difference_with_rows(name, baseline)
    return d.clear and d.mean > 0


def _memorised(results: Results) -> list[str]:
    """Branches whose training accuracy says nothing about the held-out one."""
    rows = [row for row in results.chosen["unimodal"] if "training_accuracy" in row]
    found = []
    for m in results.modalities if rows else ():
        training = sum(row["training_accuracy"][m] for row in rows) / len(rows)
        held_out = float(results.values("unimodal", m).mean())
        if training - held_out > 0.2:
            found.append(
                f"{m} memorises: {_percent(training)} of the training rows, {_percent(held_out)} of the "
                "held-out ones. Its training statistics, and the rules which rest on them, overrate it."
            )
    return found


def _at_the_edge(results: Results, rungs: list[str]) -> list[str]:
    """Learning rates chosen at the end of what was tried, so that the best may lie beyond."""
    tried = sorted({row["rate"] for row in results.rows})
    if len(tried) < 2:
        return []
    edges = {"smallest": tried[0], "largest": tried[-1]}
    at = {edge: [name for name in rungs if results.rate(name) == rate] for edge, rate in edges.items()}
    return [
        f"The best learning rate was the {edge} tried, {edges[edge]:g}, for: {_list(results, names)}. Try "
        "beyond it."
        for edge, names in at.items()
        if len(names) == len(rungs)
    ]


def _points(d: Difference) -> str:
    return f"{100 * d.mean:+.1f} ± {100 * d.error:.1f} points ({'clear' if d.clear else 'within noise'})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _name(results: Results, name: str) -> str:
    return results.title(name).removeprefix("+ ")


def _list(results: Results, names: list[str]) -> str:
    return ", ".join(_name(results, name) for name in names)
