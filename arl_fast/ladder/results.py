"""Rows of trained models, one JSON object a line, and what is read from them: choices, differences."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .methods import TITLES, WEIGHTED

OWNER = {weighted: name for name, weighted in WEIGHTED.items()}

# 97.5 % points of Student's t for 1, 2, ... degrees of freedom; beyond: the normal distribution's, about
T_975 = (
    *(12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23),
    *(2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09, 2.09),
)


def load_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file. A last line that was cut off in the middle is left out."""
    rows = []
    lines = Path(path).read_text().splitlines(keepends=True)
    for i, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if i + 1 < len(lines):
                raise ValueError(f"{path}: line {i + 1} is no JSON object: {error}") from error
    return rows


def measure(
    logits: dict[str, Tensor], target: Tensor, ignore_index: int = -100
) -> tuple[dict[str, dict[str, float]], str]:
    """Accuracy, macro F1 and mean loss by branch; which rows the fused one had right, as bits.

    Macro F1 is the mean of F1 over the classes that occur among the targets or the predictions, as in
    scikit-learn.

    Args:
        logits: [N, C] by branch.
        target: [N] class indices.
        ignore_index: targets to leave out.
    """
    keep = target != ignore_index
    target = target[keep].long()
    if not len(target):
        raise ValueError("target: got no row to measure, all are ignored or there is none")
    result, correct = {}, ""
    for name, x in logits.items():
        x = x[keep]
        right = x.argmax(1) == target
        result[name] = {
            "accuracy": float(right.double().mean()),
            "macro_f1": macro_f1(x.argmax(1), target, x.shape[1]),
            "loss": float(F.cross_entropy(x.double(), target)),
        }
        if name == "fused":
            correct = bits_to_hex(right)
    return result, correct


def measure_labels(logits: dict[str, Tensor], target: Tensor) -> tuple[dict[str, dict[str, float]], str]:
    """``measure`` for a yes or no per label: over the pairs of a row and a label that is known.

    A pair is right if the logit is above 0 where the target is above 1/2, and at most 0 elsewhere. Macro F1
    is the mean over the labels that occur among the targets or the predictions (NaN if none does), the loss
    is the binary cross-entropy.

    Args:
        logits: [N, L] by branch.
        target: [N, L] in [0, 1], NaN where a label is not known.
    """
    known, truth = ~target.isnan(), target > 0.5
    if not bool(known.any()):
        raise ValueError("target: got no label to measure, none is known or there is no row")
    result, correct = {}, ""
    for name, x in logits.items():
        yes = (x > 0) & known
        right = (yes == truth) & known
        hits = (yes & truth).sum(0).double()
        both = yes.sum(0) + (truth & known).sum(0)
        result[name] = {
            "accuracy": float(right.sum() / known.sum()),
            "macro_f1": float((2 * hits[both > 0] / both[both > 0]).mean()),
            "loss": float(F.binary_cross_entropy_with_logits(x[known].double(), target[known].double())),
        }
        if name == "fused":
            rows, labels = right.shape
            correct = f"{rows}x{labels}/{int(known.sum())}:{bits_to_hex(right.flatten()).partition(':')[2]}"
    return result, correct


def macro_f1(prediction: Tensor, target: Tensor, classes: int) -> float:
    """Mean F1 over the classes that occur in either [N]."""
    hits = torch.bincount(target[prediction == target], minlength=classes).double()
    both = torch.bincount(target, minlength=classes).double() + torch.bincount(prediction, minlength=classes)
    return float((2 * hits[both > 0] / both[both > 0]).mean())


def bits_to_hex(bits: Tensor) -> str:
    """[N] of bool as N/4 hexadecimal digits, with the number of rows before them: "5:1d"."""
    padded = F.pad(bits.to(torch.uint8), (0, -len(bits) % 8)).view(-1, 8)
    packed = (padded << torch.arange(8, dtype=torch.uint8)).sum(1)
    return f"{len(bits)}:{bytes(packed.tolist()).hex()}"


def row_scores(text: str) -> Tensor:
    """What each row adds to the accuracy, from the text that ``measure`` or ``measure_labels`` gave.

    [N] of float64, whose mean is the accuracy: 1 or 0, or, of L labels, the number of those that are right
    times rows over known labels.
    """
    size, _, digits = text.partition(":")
    packed = torch.tensor(list(bytes.fromhex(digits)), dtype=torch.uint8)
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).view(-1).double()
    if "x" not in size:
        return bits[: int(size)]
    rows, labels, known = (int(n) for n in size.replace("/", "x").split("x"))
    return bits[: rows * labels].view(rows, labels).sum(1) * rows / known


class Difference(NamedTuple):
    """A paired difference: its mean over ``pairs`` seeds and its standard error (NaN for a single pair)."""

    mean: float
    error: float
    pairs: int

    @property
    def clear(self) -> bool:
        """Whether 0 lies outside the 95 % confidence interval (Student's t); never with a single pair."""
        if self.pairs < 2:
            return False
        t = T_975[self.pairs - 2] if self.pairs - 2 < len(T_975) else 1.98
        return abs(self.mean) > t * self.error


def difference(values: Tensor, baseline: Tensor) -> Difference:
    """Of values [seeds] to those of a baseline with the same seeds."""
    delta = values - baseline
    return Difference(
        float(delta.mean()),
        float(delta.std() / len(delta) ** 0.5) if len(delta) > 1 else float("nan"),
        len(delta),
    )


class Results:
    """What a ladder has given.

    Args:
        rows: of all trained models.
        modalities: their names, in order.
        histories: by the key of a row, for those trained in this process.

    Attributes:
        chosen: method -> its row for each seed, at the learning rate and the variant that had the best mean
            validation accuracy (the lower validation loss where two are equal; without validation data there
            is only one).
    """

    def __init__(
        self,
        rows: Sequence[dict[str, Any]],
        modalities: Sequence[str],
        histories: dict[tuple, Any] | None = None,
    ) -> None:
        self.rows = list(rows)
        self.modalities = list(modalities)
        self.histories = histories or {}
        self.seeds = sorted({row["seed"] for row in self.rows})
        groups: dict[str, dict[tuple, list[dict[str, Any]]]] = {}
        for row in self.rows:
            groups.setdefault(row["method"], {}).setdefault(
                (row["rate"], json.dumps(row["variant"])), []
            ).append(row)
        order = {name: i for i, name in enumerate([*(f"alone {m}" for m in self.modalities), *TITLES])}
        self.chosen: dict[str, list[dict[str, Any]]] = {}
        for name in sorted(groups, key=lambda name: order.get(name, len(order))):
            complete = [
                sorted(g, key=lambda row: row["seed"])
                for g in groups[name].values()
                if len(g) == len(self.seeds)
            ]
            # weights on the predictions of those very models
            if name == "weights" and "unimodal" in self.chosen:
                complete = [group for group in complete if _choice(group) == _choice(self.chosen["unimodal"])]
            if complete:
                self.chosen[name] = max(complete, key=_validation)

    @property
    def several_labels(self) -> bool:
        """Whether the rows are of a task with several labels, of which accuracy counts each by itself."""
        return any("x" in row.get("correct", "").partition(":")[0] for row in self.rows)

    def title(self, method: str) -> str:
        kind, _, modality = method.partition(" ")
        return TITLES.get(kind, method).format(modality) if kind == "alone" else TITLES.get(method, method)

    def values(self, method: str, branch: str = "fused", what: str = "accuracy") -> Tensor:
        """[seeds] of "accuracy", "macro_f1" or "loss" on the test data."""
        if method not in self.chosen:
            raise KeyError(f"method: got {method!r}, expected one of {list(self.chosen)}")
        return torch.tensor([row["test"][branch][what] for row in self.chosen[method]], dtype=torch.float64)

    def difference(
        self, method: str, baseline: str = "joint", branch: str = "fused", what: str = "accuracy"
    ) -> Difference:
        """Paired by seed."""
        return difference(self.values(method, branch, what), self.values(baseline, branch, what))

    def difference_with_rows(self, method: str, baseline: str) -> Difference:
        """The accuracy's, where all seeds have the same test rows: the choice of these adds to the error.

        Error^2 = variance over seeds / seeds + variance over rows of the mean over seeds / rows (that of
        McNemar's test).
        """
        plain = self.difference(method, baseline)
        rows = [[row_scores(row["correct"]) for row in self.chosen[name]] for name in (method, baseline)]
        per_row = (torch.stack(rows[0]) - torch.stack(rows[1])).mean(0)
        over_rows = float(per_row.var() / len(per_row)) if len(per_row) > 1 else float("nan")
        return plain._replace(error=(plain.error**2 + over_rows) ** 0.5)

    def rate(self, method: str) -> float:
        """The learning rate chosen for a method."""
        return self.chosen[method][0]["rate"]

    def variant(self, method: str) -> dict[str, Any]:
        return self.chosen[method][0]["variant"]

    def history(self, method: str) -> list[Any]:
        """The History of each seed; those of models from a file of rows are missing."""
        keys = [
            (row["method"], row["seed"], row["rate"], json.dumps(row["variant"]))
            for row in self.chosen[method]
        ]
        return [self.histories[key] for key in keys if key in self.histories]

    def accuracy(self) -> dict[str, dict[str, Tensor]]:
        """Title -> branch -> percent [seeds], as ``arl_fast.plots.accuracies`` draws them."""
        return {
            self.title(name): {branch: 100 * self.values(name, branch) for branch in rows[0]["test"]}
            | ({name.partition(" ")[2]: 100 * self.values(name)} if name.startswith("alone ") else {})
            for name, rows in self.chosen.items()
        }

    def table(self, baseline: str = "joint", markdown: bool = False, same_rows: bool = False) -> str:
        """Percent on the test data, mean ± standard deviation over seeds; differences ± their standard error.

        Args:
            baseline: the method to take differences to, paired by seed.
            markdown: for a page instead of a terminal.
            same_rows: the errors are those of ``difference_with_rows``.
        """
        head = [
            "test, %",
            "accuracy",
            "minus " + baseline,
            "macro F1",
            *(f"{m} alone" for m in self.modalities),
        ]
        lines = [head]
        for name, rows in self.chosen.items():
            single = name.startswith("alone ")
            cells = ["" if single else _cell(self.values(name)), ""]
            if not single and name != baseline and baseline in self.chosen:
                d = (self.difference_with_rows if same_rows else self.difference)(name, baseline)
                cells[1] = f"{100 * d.mean:+.1f}" + (f" ± {100 * d.error:.1f}" if d.pairs > 1 else "")
            cells.append(_cell(self.values(name, what="macro_f1")))
            for m in self.modalities:
                own = "fused" if name == f"alone {m}" else m
                cells.append(
                    _cell(self.values(name, own))
                    if own in rows[0]["test"] and (not single or own == "fused")
                    else ""
                )
            lines.append([self.title(name), *cells])
        if markdown:
            lines.insert(1, ["---"] * len(head))
            return "\n".join("| " + " | ".join(line) + " |" for line in lines)
        text = _columns(lines)
        if len(self.seeds) > 1:
            text += "\n\nMean ± standard deviation over seeds; differences: paired by seed, ± standard error."
        return text


def _choice(rows: list[dict[str, Any]]) -> tuple[float, str]:
    return rows[0]["rate"], json.dumps(rows[0]["variant"])


def _validation(rows: list[dict[str, Any]]) -> tuple[float, float]:
    if "validation" not in rows[0]:
        return 0.0, 0.0
    fused = [row["validation"]["fused"] for row in rows]
    return sum(v["accuracy"] for v in fused) / len(fused), -sum(v["loss"] for v in fused) / len(fused)


def _columns(lines: list[list[str]]) -> str:
    """Lines of cells as text: the first column to the left, the others to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    shown = []
    for first, *others in lines:
        shown.append(
            first.ljust(widths[0]) + "".join(f"  {c:>{w}}" for c, w in zip(others, widths[1:], strict=True))
        )
    return "\n".join(shown)


def _cell(values: Tensor) -> str:
    return f"{100 * values.mean():.1f}" + (f" ± {100 * values.std():.1f}" if len(values) > 1 else "")
