"""Multiple features of handwritten digits (UCI 72): 2,000 digits, six descriptions of each.

    DIR/mfeat-fac, mfeat-fou, mfeat-kar, mfeat-mor, mfeat-pix, mfeat-zer    columns; 200 lines per digit

Dealt out by seed: 60 % for training, 20 % for validation, 20 % for testing, of every digit. Columns are
standardised by the training data.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..config import Config
from .base import Check, Data, Memory, report

VIEWS = ("fac", "fou", "kar", "mor", "pix", "zer")
PER_DIGIT = 200
PARTS = {"train": (0, 120), "validation": (120, 160), "test": (160, 200)}


def _read(path: Path) -> Tensor:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; --check lists everything that is missing")
    values = torch.tensor(
        [[float(x) for x in line.split()] for line in path.read_text().splitlines() if line.strip()]
    )
    if len(values) != 10 * PER_DIGIT:
        raise ValueError(f"{path}: got {len(values)} lines, expected 2000")
    return values


def check(folder: Path, config: Config) -> Check:
    missing = [str(folder / f"mfeat-{view}") for view in VIEWS if not (folder / f"mfeat-{view}").is_file()]
    return report(
        {"files": len(VIEWS) - len(missing)},
        missing,
        "mfeat.zip of archive.ics.uci.edu/dataset/72/multiple+features",
    )


def load(folder: Path, config: Config, seed: int, cache: Path | None = None) -> Data:
    views = {view: _read(folder / f"mfeat-{view}") for view in VIEWS}
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack(
        [PER_DIGIT * digit + torch.randperm(PER_DIGIT, generator=generator) for digit in range(10)]
    )
    rows = {side: order[:, first:last].flatten() for side, (first, last) in PARTS.items()}
    for view, x in views.items():
        mean, std = x[rows["train"]].mean(0), x[rows["train"]].std(0).clamp(min=1e-6)
        views[view] = (x - mean) / std
    made = {
        side: Memory({view: x[part] for view, x in views.items()}, part // PER_DIGIT)
        for side, part in rows.items()
    }
    return Data(**made, classes=[str(digit) for digit in range(10)], fold=str(seed))
