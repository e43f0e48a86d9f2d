"""Results as rows: one JSON object per line and trained model, with its scores on the test data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def scores(logits: Tensor, targets: Tensor) -> dict[str, float]:
    """Accuracy, macro F1 and mean confidence (largest probability) in percent, cross-entropy in nats.

    Macro F1 is the mean over the classes that occur among targets or predictions, as scikit-learn's is.
    """
    predicted, classes = logits.argmax(1), logits.shape[1]
    counts = (
        torch.bincount(targets * classes + predicted, minlength=classes * classes)
        .view(classes, classes)
        .double()
    )
    hits, total = counts.diag(), counts.sum(0) + counts.sum(1)
    f1 = (2 * hits / total.clamp(min=1))[total > 0].mean()
    logp = torch.log_softmax(logits.double(), 1)
    return {
        "accuracy": round(100 * float(hits.sum() / counts.sum()), 3),
        "macro_f1": round(100 * float(f1), 3),
        "cross_entropy": round(float(-logp.gather(1, targets[:, None]).mean()), 4),
        "confidence": round(100 * float(logp.exp().amax(1).mean()), 2),
    }


def key(row: dict[str, Any]) -> str:
    """What a row is about: two rows with the same key are the same experiment."""
    return json.dumps(
        [row[name] for name in ("dataset", "method", "seed", "rate", "changes")], sort_keys=True
    )


def read(*paths: Path) -> list[dict[str, Any]]:
    """The rows of JSONL files, the last of each key. A last line that a crash cut off is passed over."""
    rows: dict[str, dict[str, Any]] = {}
    for path in paths:
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                if number == len(lines):
                    continue
                raise ValueError(f"{path}, line {number}: not a JSON object: {error}") from error
            rows[key(row)] = row
    return list(rows.values())


def append(path: Path, row: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text() if path.exists() else ""
    if text and not text.endswith("\n"):  # the line that a crash cut off
        path.write_text(text[: text.rfind("\n") + 1])
    with path.open("a") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
