"""Heads that share all their parameters between the fused and the unimodal predictions.

Each takes the encoders' features, marks them with ``modulate`` and returns BranchLogits. Where the head is linear, the
unimodal predictions are pieces of the fused one: M matrix products instead of M+1 zero-padded ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._autograd.link import modulate
from ._core.branches import BranchLogits
from ._core.checks import describe
from ._core.spec import BranchStats
from .linear import linear_arl_loss
from .loss import ARLLoss

Features = Mapping[str, Tensor] | Sequence[Tensor]
Dims = Mapping[str, int] | Sequence[int]


class _Head(nn.Module):
    """Names and feature sizes of the modalities; dict or sequence as given."""

    def __init__(self, features: Dims) -> None:
        super().__init__()
        if isinstance(features, str) or not isinstance(features, (Mapping, Sequence)) or len(features) == 0:
            raise TypeError(
                f"features: got {features!r}, expected feature sizes by modality, as {{'audio': 512, 'visual': 512}}"
            )
        self.names: list[str] | None = list(features) if isinstance(features, Mapping) else None
        self.dims: list[int] = list(features.values()) if isinstance(features, Mapping) else list(features)
        for name, dim in zip(self.names or range(len(self.dims)), self.dims, strict=True):
            if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
                raise ValueError(f"features[{name!r}]: got {dim!r}, expected a feature size >= 1")

    def _as_list(self, features: Features) -> list[Tensor]:
        """The features in this head's order, checked."""
        if self.names is None:
            if isinstance(features, (Tensor, Mapping)) or len(features) != len(self.dims):
                raise ValueError(
                    f"features: got {describe(features)}, expected a sequence of {len(self.dims)} tensors"
                )
            tensors = list(features)
        else:
            if not isinstance(features, Mapping) or set(features) != set(self.names):
                raise ValueError(
                    f"features: got {describe(features)}, expected a dict with the keys {self.names}"
                )
            tensors = [features[name] for name in self.names]
        batch = tensors[0].shape[:-1] if isinstance(tensors[0], Tensor) else None
        for name, z, dim in zip(self.names or range(len(tensors)), tensors, self.dims, strict=True):
            if not isinstance(z, Tensor) or z.dim() < 2 or z.shape[-1] != dim:
                got = f"shape {list(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
                raise ValueError(f"features[{name!r}]: got {got}, expected [B, {dim}] or [B, d1, ..., {dim}]")
            if z.shape[:-1] != batch:
                first = (self.names or [0])[0]
                raise ValueError(
                    f"features[{name!r}]: got shape {list(z.shape)}, expected {[*batch, dim]}, the batch and positions of "
                    f"features[{first!r}]"
                )
        return tensors

    def forward(self, features: Features) -> BranchLogits:
        """Features [B, D_m] by modality -> BranchLogits with logits [B, C]; [B, d1, ..., D_m] -> [B, C, d1, ...]."""
        tensors: Any = self._as_list(features)
        if self.names is None:
            tensors, link = modulate(tensors)
        else:
            named, link = modulate(dict(zip(self.names, tensors, strict=True)))
            tensors = list(named.values())
        fused, unimodal = self.branches(tensors)
        if (
            fused.dim() > 2
        ):  # the layers leave the classes in the last dimension, the loss takes them in dimension 1
            fused, unimodal = fused.movedim(-1, 1), [x.movedim(-1, 1) for x in unimodal]
        named_unimodal = unimodal if self.names is None else dict(zip(self.names, unimodal, strict=True))
        return BranchLogits(fused, named_unimodal, link)

    def branches(self, features: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The fused and the M unimodal logits [B, d1, ..., C] of features [B, d1, ..., D_m], without a link."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"features={dict(zip(self.names, self.dims, strict=True)) if self.names else self.dims}"


class _LinearHead(_Head):
    """A head of linear layers: with its loss it fuses into one function that never holds all logits."""

    fusion: str
    bias_mode: str | bool = "full"

    def weights_and_bias(self) -> tuple[Any, Any]:
        """Weights and biases as ``linear_arl_loss`` takes them for this head's fusion."""
        raise NotImplementedError

    def loss(
        self,
        features: Features,
        target: Tensor,
        criterion: ARLLoss | None = None,
        mask: Tensor | None = None,
        chunk: int | None = None,
        **options: Any,
    ) -> tuple[Tensor, BranchStats]:
        """``loss, stats = head.loss(features, target)`` in the place of ``criterion(head(features), target)``.

        Never holds more than a chunk of logits (``linear_arl_loss``). The layers' parameters are read directly: forward
        hooks on the layers do not run.

        Args:
            features: as for the head.
            target, mask, chunk: as for ``linear_arl_loss``.
            criterion: the ARLLoss whose options, class weights and warm-up count; None: ``options``.
            options: those of ``linear_arl_loss``, where no criterion is given.

        Returns:
            loss and BranchStats, which are also in ``criterion.stats``.
        """
        tensors: Any = self._as_list(features)
        if self.names is not None:
            tensors = dict(zip(self.names, tensors, strict=True))
        weights, bias = self.weights_and_bias()
        layout: dict[str, Any] = dict(fusion=self.fusion, chunk=chunk)
        layout["bias_mode"] = "split" if self.bias_mode == "split" else "full"
        if criterion is None:
            return linear_arl_loss(tensors, weights, bias, target, mask=mask, **layout, **options)
        if not isinstance(criterion, ARLLoss):
            raise TypeError(
                f"criterion: got {type(criterion).__name__}, expected an ARLLoss, or its options by name"
            )
        if options:
            raise TypeError(
                f"criterion: got one and also {', '.join(options)}; options belong to the criterion"
            )
        loss = criterion.linear(tensors, weights, bias, target, mask, **layout)
        assert criterion.stats is not None
        return loss, criterion.stats


def _same_dims(dims: list[int], head: str) -> int:
    if len(set(dims)) != 1:
        raise ValueError(f"features: {head} needs one feature size for all modalities, got {dims}")
    return dims[0]


class ConcatHead(_LinearHead):
    """One linear layer over the concatenated features: x_f = sum_m W_m z_m + b.

    A unimodal branch is the same layer with the other features at zero, x_m = W_m z_m + b (``bias="full"``, as in the
    release) or, so that the branches sum up to the fused logits, x_m = W_m z_m + b / M (``bias="split"``).

    Args:
        features: feature size by modality, as {"audio": 512, "visual": 512} or [512, 512].
        num_classes: C.
        bias: "full", "split", or False for none.

    Attributes:
        weight: [C, sum D_m], initialised as ``torch.nn.Linear``; bias: [C] or None.
    """

    fusion = "concat"

    def __init__(self, features: Dims, num_classes: int, bias: str | bool = "full") -> None:
        super().__init__(features)
        if bias not in ("full", "split", False):
            raise ValueError(f"bias: got {bias!r}, expected 'full', 'split' or False")
        self.bias_mode = bias
        linear = nn.Linear(sum(self.dims), num_classes, bias=bias is not False)
        self.weight, self.bias = linear.weight, linear.bias

    def branches(self, features: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        parts = [F.linear(z, w) for z, w in zip(features, self.weight.split(self.dims, 1), strict=True)]
        fused = _sum(parts)
        if self.bias is None:
            return fused, parts
        bias = self.bias.to(fused.dtype)  # under autocast: adding float32 would make float32 logits
        own = bias if self.bias_mode == "full" else bias / len(parts)
        return fused + bias, [part + own for part in parts]

    def weights_and_bias(self) -> tuple[Any, Any]:
        return self.weight, self.bias


class SumHead(_LinearHead):
    """One linear layer per modality, added: x_m = W_m z_m + b_m, x_f = sum_m x_m (the release's "sum" fusion).

    Args:
        features: feature size by modality.
        num_classes: C.
        bias: whether each layer has a bias.
    """

    fusion = "sum"

    def __init__(self, features: Dims, num_classes: int, bias: bool = True) -> None:
        super().__init__(features)
        self.layers = nn.ModuleList(nn.Linear(dim, num_classes, bias=bias) for dim in self.dims)

    def branches(self, features: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        unimodal = [layer(z) for layer, z in zip(self.layers, features, strict=True)]
        return _sum(unimodal), unimodal

    def weights_and_bias(self) -> tuple[Any, Any]:
        biases = [layer.bias for layer in self.layers]
        return [layer.weight for layer in self.layers], None if biases[0] is None else biases


class SharedHead(_LinearHead):
    """One linear layer for all modalities: x_m = W z_m + b, x_f = sum_m x_m, so that b counts M times, as in the release.

    Args:
        features: feature size by modality, all equal.
        num_classes: C.
        bias: whether the layer has a bias.
    """

    fusion = "shared"

    def __init__(self, features: Dims, num_classes: int, bias: bool = True) -> None:
        super().__init__(features)
        self.layer = nn.Linear(_same_dims(self.dims, "SharedHead"), num_classes, bias=bias)

    def branches(self, features: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        unimodal = [self.layer(z) for z in features]
        return _sum(unimodal), unimodal

    def weights_and_bias(self) -> tuple[Any, Any]:
        return self.layer.weight, self.layer.bias


class GatedHead(_Head):
    """Two modalities, one gating the other: x_f = W (sigmoid(h_g) * h_o) + b with h_m = W_m z_m + b_m.

    The unimodal branch is the release's: a modality gates itself, x_m = W (sigmoid(h_m) * h_m) + b.

    Args:
        features: feature sizes of two modalities.
        num_classes: C.
        hidden: size of h_m; None: the first feature size.
        gate: which modality gates, its name or position; the first by default.
    """

    def __init__(
        self, features: Dims, num_classes: int, hidden: int | None = None, gate: str | int | None = None
    ) -> None:
        super().__init__(features)
        if len(self.dims) != 2:
            raise ValueError(f"features: GatedHead is defined for two modalities, got {len(self.dims)}")
        names: list[Any] = self.names or [0, 1]
        if gate is not None and gate not in names:
            raise ValueError(f"gate: got {gate!r}, expected one of {names}")
        self.gate = 0 if gate is None else names.index(gate)
        hidden = hidden or self.dims[0]
        self.layers = nn.ModuleList(nn.Linear(dim, hidden) for dim in self.dims)
        self.out = nn.Linear(hidden, num_classes)

    def branches(self, features: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        hidden = [layer(z) for layer, z in zip(self.layers, features, strict=True)]
        gates = [torch.sigmoid(h) for h in hidden]
        fused = self.out(gates[self.gate] * hidden[1 - self.gate])
        return fused, [self.out(g * h) for g, h in zip(gates, hidden, strict=True)]


class BilinearHead(_Head):
    """Two modalities, their outer product: x_f = W U vec(z_0 z_1^T); unimodal x_m = W U vec(z_m z_m^T).

    What the release calls "film". At D = 512 the layer U alone has D^2 hidden, 134 million, parameters.

    Args:
        features: feature sizes of two modalities, both equal.
        num_classes: C.
        hidden: size of the layer between the outer product and the logits; None: the feature size.
    """

    def __init__(self, features: Dims, num_classes: int, hidden: int | None = None) -> None:
        super().__init__(features)
        if len(self.dims) != 2:
            raise ValueError(f"features: BilinearHead is defined for two modalities, got {len(self.dims)}")
        dim = _same_dims(self.dims, "BilinearHead")
        self.layer = nn.Linear(dim * dim, hidden or dim)
        self.out = nn.Linear(hidden or dim, num_classes)

    def branches(self, features: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        a, b = features
        fused, *unimodal = (
            self.out(self.layer(torch.einsum("...i,...j->...ij", x, y).flatten(-2)))
            for x, y in ((a, b), (a, a), (b, b))
        )
        return fused, unimodal


class ZeroedHead(nn.Module):
    """Any fusion: the fused logits are ``fusion(features)``, modality m's the same with all other features zeroed.

    One call per branch, M+1 in all; use a linear head where the fusion is linear.

    Args:
        fusion: a callable (an ``nn.Module`` is registered) from features, a dict or a list as given, to logits.
    """

    def __init__(self, fusion: Callable[[Any], Tensor]) -> None:
        super().__init__()
        if not callable(fusion):
            raise TypeError(
                f"fusion: got {type(fusion).__name__}, expected a callable from features to logits"
            )
        self.fusion = fusion

    def forward(self, features: Features) -> BranchLogits:
        """Features of any shape by modality -> BranchLogits of whatever shape the fusion returns."""
        features, link = modulate(features)
        fused = self.fusion(features)
        if isinstance(features, dict):
            zeros = {name: torch.zeros_like(z) for name, z in features.items()}
            return BranchLogits(
                fused, {name: self.fusion({**zeros, name: z}) for name, z in features.items()}, link
            )
        blank = [torch.zeros_like(z) for z in features]
        return BranchLogits(
            fused, [self.fusion([*blank[:m], z, *blank[m + 1 :]]) for m, z in enumerate(features)], link
        )


def _sum(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
