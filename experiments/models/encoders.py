"""The encoders give features [B, width]; some also have ``tokens``, which gives [B, n, width]."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Config
from .resnet import ResNet18, fold_time


def encoder(config: Config, shape: list[int]) -> Any:
    """The configuration's encoder for one modality, whose items have this shape.

    Sequences [n, features] take a transformer under "transformer" and a convolution along n under "small"; a
    picture [channels, H, W] takes a ResNet-18, a Swin transformer or a small convolutional network.
    """
    kind = config.encoder
    if kind == "resnet18" and len(shape) >= 3:
        return ResNet18(shape[-3])
    if kind == "swin" and len(shape) >= 3:
        return Swin(shape[-3])
    if kind == "transformer" and len(shape) == 2:
        return Transformer(shape[1], shape[0], config.width)
    if kind == "small" and len(shape) == 3:
        return SmallConv(shape[0], config.width)
    if kind == "small" and len(shape) == 2:
        return Sequence(shape[1], config.width)
    if kind == "mlp":
        return MLP(math.prod(shape), config.width)
    raise ValueError(f"encoder: {kind!r} does not take items of shape {shape}")


class SmallConv(nn.Sequential):
    """Small pictures [B, channels, H, W]: two convolutions."""

    def __init__(self, channels: int, width: int) -> None:
        layers: list[nn.Module] = []
        for inside, outside in ((channels, 8), (8, 16)):
            layers += [nn.Conv2d(inside, outside, 3, stride=2, padding=1), nn.BatchNorm2d(outside), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(6), nn.Flatten(), nn.Linear(16 * 36, width), nn.ReLU())
        self.width = width


class Sequence(nn.Module):
    """Short sequences [B, n, features], as a pen's path: two convolutions, the order kept in eighths."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inside, outside in ((features, 32), (32, 32)):
            layers += [nn.Conv1d(inside, outside, 5, stride=2, padding=2), nn.BatchNorm1d(outside), nn.ReLU()]
        self.layers = nn.Sequential(
            *layers, nn.AdaptiveAvgPool1d(8), nn.Flatten(), nn.Linear(32 * 8, width), nn.ReLU()
        )
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.transpose(1, 2))


class MLP(nn.Sequential):
    """A vector of measured values: one hidden layer."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(size, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.width = width


class Transformer(nn.Module):
    """Sequences [B, n, features], as MOSI's words with sound and face: four layers, the mean over n."""

    def __init__(self, features: int, length: int, width: int, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.enter = nn.Linear(features, width)
        self.place = nn.Parameter(0.02 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.1, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.width = width

    def tokens(self, x: Tensor) -> Tensor:
        return self.layers(self.enter(x) + self.place)

    def forward(self, x: Tensor) -> Tensor:
        return self.tokens(x).mean(1)


class Swin(nn.Module):
    """torchvision's Swin-T (the paper's Table 4) for `channels`; of clips, the mean over time."""

    width = 768

    def __init__(self, channels: int) -> None:
        super().__init__()
        try:
            from torchvision.models import swin_t
        except ImportError as error:
            raise ImportError(
                "encoder 'swin' is torchvision's: pip install the torchvision that belongs to your torch"
            ) from error
        self.swin = swin_t()
        first = self.swin.features[0][0]
        self.swin.features[0][0] = nn.Conv2d(channels, first.out_channels, first.kernel_size, first.stride)
        self.swin.head = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x, times = fold_time(x)
        return self.swin(x).view(-1, times, self.width).mean(1)
