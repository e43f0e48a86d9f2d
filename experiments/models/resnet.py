"""ResNet-18 (He et al., 2016) for spectrograms and frames, with torchvision's parameter names."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3 x 3 convolutions and what they are added to."""

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = (
            nn.Sequential(nn.Conv2d(inside, width, 1, stride, bias=False), nn.BatchNorm2d(width))
            if stride != 1 or inside != width
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class ResNet18(nn.Module):
    """Pictures [B, channels, H, W] or clips [B, T, channels, H, W] -> mean features [B, 512]."""

    width = 512

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        sizes = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
        for i, (inside, width, stride) in enumerate(sizes, 1):
            setattr(self, f"layer{i}", nn.Sequential(Block(inside, width, stride), Block(width, width, 1)))
        for module in self.modules():  # as in the release
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, mean=1, std=0.02)

    def stages(self) -> list[Callable[[Tensor], Tensor]]:
        """The four stages, the first with what comes before it: between them models may exchange features."""
        layer1, *later = (getattr(self, f"layer{i}") for i in range(1, 5))
        return [lambda x: layer1(self.stem(x)), *later]

    def stem(self, x: Tensor) -> Tensor:
        return self.maxpool(torch.relu(self.bn1(self.conv1(x))))

    def maps(self, x: Tensor) -> tuple[Tensor, int]:
        """Feature maps [B * T, 512, h, w] and T."""
        x, times = fold_time(x)
        for stage in self.stages():
            x = stage(x)
        return x, times

    def forward(self, x: Tensor) -> Tensor:
        return pool(*self.maps(x))

    def tokens(self, x: Tensor) -> Tensor:
        """The feature maps' places and times as a sequence [B, T * h * w, 512]."""
        maps, times = self.maps(x)
        return maps.flatten(2).transpose(1, 2).reshape(len(maps) // times, -1, self.width)


def fold_time(x: Tensor) -> tuple[Tensor, int]:
    """[B, T, C, H, W] -> [B * T, C, H, W] and T; pictures [B, C, H, W] as they are."""
    return (x.flatten(0, 1), x.shape[1]) if x.dim() == 5 else (x, 1)


def pool(maps: Tensor, times: int) -> Tensor:
    """Feature maps [B * T, C, h, w] -> their mean over place and time, [B, C]."""
    return maps.mean((2, 3)).view(-1, times, maps.shape[1]).mean(1)
