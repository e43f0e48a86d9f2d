"""Encoders and a head, as a configuration and a method ask for them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import arl_fast

from ..config import Config
from .encoders import encoder
from .intermediate import CrossModalTransformer, ExchangingResNets
from .resnet import ResNet18

HEADS = {
    "concat": arl_fast.ConcatHead,
    "sum": arl_fast.SumHead,
    "shared": arl_fast.SharedHead,
    "gated": arl_fast.GatedHead,
    "bilinear": arl_fast.BilinearHead,
}


class Net(nn.Module):
    """Inputs by modality -> BranchLogits. The link is made at the encoders' ends, by the head."""

    def __init__(self, encode: Any, head: nn.Module) -> None:
        super().__init__()
        self.encode, self.head = encode, head

    def forward(self, x: dict[str, Tensor]) -> arl_fast.BranchLogits:
        return self.head(self.encode(x))


class Separate(nn.Module):
    """One encoder per modality, without exchange; with `tokens`, sequences in the place of features."""

    def __init__(self, encoders: dict[str, nn.Module], tokens: bool = False) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(encoders)
        self.tokens = tokens

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        nets: dict[str, Any] = dict(self.encoders.items())
        return {name: net.tokens(x[name]) if self.tokens else net(x[name]) for name, net in nets.items()}


class AuxiliaryHead(nn.Module):
    """A head whose unimodal logits come from a linear layer of their own, one for all modalities.

    The way of "Fusion or Confusion?" (docs/errata.md): the auxiliary layer is not the fused prediction's.
    """

    def __init__(self, head: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.head, self.auxiliary = head, nn.Linear(width, classes)

    def forward(self, features: dict[str, Tensor]) -> arl_fast.BranchLogits:
        features, link = arl_fast.modulate(features)
        unimodal = {name: self.auxiliary(z) for name, z in features.items()}
        return arl_fast.BranchLogits(self.head(features).fused, unimodal, link)


def build(config: Config, shapes: dict[str, list[int]], classes: int, auxiliary: bool = False) -> Net:
    """The model for modalities whose items have these shapes.

    Args:
        config: names the encoder and the fusion.
        shapes: shape of one item by modality.
        classes: number of classes.
        auxiliary: a separate head for the unimodal logits, as the method "arl-simple-mml" has it.
    """
    names = list(shapes)
    if config.fusion == "mmtm":
        if config.encoder != "resnet18" or any(len(shape) < 3 for shape in shapes.values()):
            raise ValueError(f"fusion 'mmtm' needs ResNet-18s, got encoder {config.encoder!r} for {shapes}")
        encode: Any = ExchangingResNets({name: shape[-3] for name, shape in shapes.items()})
        width = ExchangingResNets.width
        head: nn.Module = arl_fast.ConcatHead(dict.fromkeys(names, width), classes)
    else:
        encoders = {name: encoder(config, shape) for name, shape in shapes.items()}
        width = next(iter(encoders.values())).width
        if config.fusion == "transformer":
            if not all(hasattr(net, "tokens") for net in encoders.values()):
                raise ValueError(f"fusion 'transformer' takes tokens; encoder {config.encoder!r} has none")
            encode, head = (
                Separate(encoders, tokens=True),
                arl_fast.ZeroedHead(CrossModalTransformer(names, width, classes)),
            )
        else:
            encode = Separate(encoders)
            kind = HEADS[config.fusion] if len(names) > 1 else arl_fast.ConcatHead
            head = kind(dict.fromkeys(names, width), classes)
    if auxiliary:
        if config.fusion == "transformer":
            raise ValueError(
                "a separate head for the unimodal logits takes features; fusion 'transformer' has tokens"
            )
        head = AuxiliaryHead(head, width, classes)
    return Net(encode, head)


__all__ = ["Net", "ResNet18", "build"]
