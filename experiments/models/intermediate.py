"""Fusion before the encoders' ends (the paper's Table 3), with ARL's link at the ends.

What "the other modality is absent" means here: its *features at the encoders' ends* are zero. Where encoders
exchange features on the way, the unimodal branch of one modality therefore still depends on the other's
input, and the gain of a modality scales everything that flows back through its end, the exchange included. An
absent input is another question, which neither the paper nor this code asks.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from .resnet import ResNet18, fold_time, pool


class MMTM(nn.Module):
    """MMTM (Joze et al., 2020): scales channels by 2 sigmoid of what all modalities show on average."""

    def __init__(self, names: list[str], channels: int, reduction: int = 4) -> None:
        super().__init__()
        joint = len(names) * channels // (2 * reduction)
        self.squeeze = nn.Linear(len(names) * channels, joint)
        self.excite = nn.ModuleDict({name: nn.Linear(joint, channels) for name in names})

    def forward(self, maps: dict[str, Tensor], times: dict[str, int]) -> dict[str, Tensor]:
        joint = torch.relu(self.squeeze(torch.cat([pool(maps[name], times[name]) for name in maps], 1)))
        out = {}
        for name, x in maps.items():
            scale = 2 * torch.sigmoid(self.excite[name](joint)).repeat_interleave(times[name], 0)
            out[name] = x * scale[:, :, None, None]
        return out


class ExchangingResNets(nn.Module):
    """One ResNet-18 per modality, an MMTM after stages two to four: features [B, 512] by modality."""

    width = ResNet18.width

    def __init__(self, channels: dict[str, int]) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({name: ResNet18(n) for name, n in channels.items()})
        self.transfers = nn.ModuleList(MMTM(list(channels), n) for n in (128, 256, 512))

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        folded = {name: fold_time(x[name]) for name in self.encoders}
        maps = {name: pictures for name, (pictures, _) in folded.items()}
        times = {name: t for name, (_, t) in folded.items()}
        stages = {name: cast(ResNet18, network).stages() for name, network in self.encoders.items()}
        for i in range(4):
            maps = {name: stages[name][i](maps[name]) for name in maps}
            if i > 0:
                maps = self.transfers[i - 1](maps, times)
        return {name: pool(maps[name], times[name]) for name in maps}


class CrossModalTransformer(nn.Module):
    """A transformer over all modalities' tokens (as in mmFormer, Zhang et al., 2022), and a linear layer.

    Tokens [B, n_m, width] by modality -> logits [B, C] from the mean over all tokens. With
    ``arl_fast.ZeroedHead`` the tokens of an absent modality are zeros, to which its learnt mark is added: it
    takes part as a constant.
    """

    def __init__(self, names: list[str], width: int, classes: int, layers: int = 2, heads: int = 8) -> None:
        super().__init__()
        self.marks = nn.ParameterDict({name: nn.Parameter(0.02 * torch.randn(width)) for name in names})
        layer = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.out = nn.Linear(width, classes)

    def forward(self, tokens: dict[str, Tensor]) -> Tensor:
        return self.out(
            self.layers(torch.cat([z + self.marks[name] for name, z in tokens.items()], 1)).mean(1)
        )
