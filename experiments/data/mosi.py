"""CMU-MOSI: 2,199 opinions as text, sound and face, aligned to 50 words, as MMSA distributes them.

    DIR/aligned_50.pkl    {"train" | "valid" | "test": {"text": [N, 50, 768], "audio": [N, 50, 5],
                          "vision": [N, 50, 20], "regression_labels": [N] from -3 to 3, ...}}

The split is the file's: 1,284, 229 and 686. Sound and face are standardised by the training data. The classes
are `sentiments`: 2 (below 0 or not), 3 (negative, neutral, positive) or 7 (rounded).
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import Config
from .base import Check, Data, Memory, report

SPLITS = {"train": "train", "validation": "valid", "test": "test"}
NAMES = {
    2: ["negative", "not negative"],
    3: ["negative", "neutral", "positive"],
    7: ["-3", "-2", "-1", "0", "1", "2", "3"],
}


class _Arrays(pickle.Unpickler):
    """A pickle may run any code; this one only makes NumPy arrays and plain containers."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {("numpy", "ndarray"), ("numpy", "dtype"), ("numpy", "str_"), ("_codecs", "encode")}
        parts = {("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer")}
        inside = (
            module.startswith(("numpy.core.", "numpy._core.")) and (module.rpartition(".")[2], name) in parts
        )
        if (module, name) in allowed or inside:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(
            f"the file asks for {module}.{name}; only arrays and plain containers are expected"
        )


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "aligned_50.pkl"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; --check lists everything that is missing")
    with path.open("rb") as file:
        return _Arrays(file).load()


def check(folder: Path, config: Config) -> Check:
    needed = f"{folder}/aligned_50.pkl: MOSI/Processed/aligned_50.pkl of github.com/thuiar/MMSA"
    if not (folder / "aligned_50.pkl").is_file():
        return report({}, [str(folder / "aligned_50.pkl")], needed)
    content = _read(folder)
    keys = ("text", "audio", "vision", "regression_labels")
    missing = [
        f"{split}/{key}" for split in SPLITS.values() for key in keys if key not in content.get(split, {})
    ]
    return report(
        {f"{name} clips": len(content.get(s, {}).get("audio", ())) for name, s in SPLITS.items()},
        missing,
        needed,
    )


def _label(scores: Tensor, sentiments: int) -> Tensor:
    if sentiments == 2:
        return (scores >= 0).long()
    if sentiments == 3:
        return scores.sign().long() + 1
    return scores.clamp(-3, 3).round().long() + 3


def load(folder: Path, config: Config, seed: int, cache: Path | None = None) -> Data:
    content = _read(folder)
    raw = {
        side: {
            m: torch.as_tensor(content[name][m]).float().nan_to_num(0.0, 0.0, 0.0)
            for m in ("text", "audio", "vision")
        }
        for side, name in SPLITS.items()
    }
    for m in ("audio", "vision"):  # their columns have units from 1 to 1000; words are embedded already
        mean, std = raw["train"][m].mean((0, 1)), raw["train"][m].std((0, 1)).clamp(min=1e-6)
        for x in raw.values():
            x[m] = (x[m] - mean) / std
    labels = {
        side: _label(torch.as_tensor(content[name]["regression_labels"]).float().flatten(), config.sentiments)
        for side, name in SPLITS.items()
    }
    train, validation, test = (Memory(raw[side], labels[side]) for side in SPLITS)
    return Data(train, validation, test, NAMES[config.sentiments])
