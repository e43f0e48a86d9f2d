"""Models of the end-to-end steps: ResNet-18 encoders for spectrograms and frames, and MLP encoders for
features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet18(nn.Module):
    """[B, channels, h, w], or [B, channels, frames, h, w] with the features averaged over frames -> [B, 8
    width].
    """

    def __init__(self, channels: int, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 7, 2, 3, bias=False)
        self.norm = nn.BatchNorm2d(width)
        sizes = [width, width, 2 * width, 4 * width, 8 * width]
        blocks = []
        for stage in range(4):
            blocks += [
                _Block(sizes[stage], sizes[stage + 1], 1 if stage == 0 else 2),
                _Block(sizes[stage + 1], sizes[stage + 1], 1),
            ]
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        if x.dim() == 5:
            x = x.transpose(1, 2).flatten(0, 1)
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 3, 2, 1)
        return self.blocks(x).mean((2, 3)).view(batch, -1, self.norm.num_features * 8).mean(1)


class Encoders(nn.Module):
    """One encoder per modality: inputs -> features [B, D]."""

    def __init__(self, encoders: Sequence[nn.Module]) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return [encoder(x) for encoder, x in zip(self.encoders, inputs, strict=True)]


def resnets(batch: int, device: str, small: bool = False) -> tuple[Encoders, list[Tensor], int]:
    """CREMA-D's inputs: a spectrogram 257 x 188 and one frame 224 x 224. ``small`` shrinks everything for a
    smoke test.
    """
    width, spectrogram, frame = (8, (33, 24), (32, 32)) if small else (64, (257, 188), (224, 224))
    inputs = [
        torch.randn(batch, 1, *spectrogram, device=device),
        torch.randn(batch, 3, 1, *frame, device=device),
    ]
    return Encoders([ResNet18(1, width), ResNet18(3, width)]).to(device), inputs, 8 * width


def mlps(batch: int, device: str, size: int = 512) -> tuple[Encoders, list[Tensor], int]:
    """Features of ``size`` through two hidden layers of ``size`` per modality."""

    def mlp() -> nn.Module:
        return nn.Sequential(
            nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size)
        )

    return (
        Encoders([mlp(), mlp()]).to(device),
        [torch.randn(batch, size, device=device) for _ in range(2)],
        size,
    )
