"""Two made-up modalities for the examples: "audio" tells the class plainly, "visual" through noise."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import arl_fast

CLASSES = 6
DIM = 16


def pairs(rows: int, seed: int = 0) -> TensorDataset:
    """audio [rows, 16], visual [rows, 16] and target [rows]."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(2, CLASSES, DIM, generator=torch.Generator().manual_seed(1))
    target = torch.randint(0, CLASSES, (rows,), generator=generator)
    audio = centers[0, target] + 0.5 * torch.randn(rows, DIM, generator=generator)
    visual = centers[1, target] + 2.0 * torch.randn(rows, DIM, generator=generator)
    return TensorDataset(audio, visual, target)


class TwoModalities(nn.Module):
    """An encoder for each modality and one head for both: audio [B, 16], visual [B, 16] -> BranchLogits of
    [B, 6].
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.audio = nn.Sequential(nn.Linear(DIM, width), nn.ReLU(), nn.Linear(width, width))
        self.visual = nn.Sequential(nn.Linear(DIM, width), nn.ReLU(), nn.Linear(width, width))
        self.head = arl_fast.ConcatHead({"audio": width, "visual": width}, CLASSES)

    def forward(self, audio: Tensor, visual: Tensor) -> arl_fast.BranchLogits:
        return self.head({"audio": self.audio(audio), "visual": self.visual(visual)})
