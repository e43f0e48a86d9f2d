"""Heads that share all their parameters between the fused and the unimodal predictions.

Each takes the encoders' features, marks them with ``modulate`` and returns BranchLogits. Where the head is
linear, the unimodal predictions are pieces of the fused one: M matrix products instead of M+1 zero-padded
ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._autograd.link import modulate
from ._core._torch import has_hooks
from ._core.branches import BranchLogits
from ._core.checks import check_choice, check_mask, describe
from ._core.spec import BranchStats
from .linear import linear_arl_loss
from .loss import ARLLoss

Features = Mapping[str, Tensor | None] | Sequence[Tensor | None]
Dims = Mapping[str, int] | Sequence[int]


class _Head(nn.Module):
    """Names and feature sizes of the modalities; dict or sequence as given."""

    def __init__(self, features: Dims) -> None:
        super().__init__()
        if isinstance(features, str) or not isinstance(features, (Mapping, Sequence)) or len(features) == 0:
            raise TypeError(
                f"features: got {features!r}, expected feature sizes by modality, as "
                "{'audio': 512, 'visual': 512}"
            )
        self.names: list[str] | None = list(features) if isinstance(features, Mapping) else None
        self.dims: list[int] = list(features.values()) if isinstance(features, Mapping) else list(features)
        for name, dim in zip(self.names or range(len(self.dims)), self.dims, strict=True):
            if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
                raise ValueError(f"features[{name!r}]: got {dim!r}, expected a feature size >= 1")

    if TYPE_CHECKING:

        def __call__(self, features: Features, mask: Tensor | None = None) -> BranchLogits: ...

    def _as_list(self, features: Features, mask: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
        """The features in this head's order, checked, zero where absent; the mask, None if all are there."""
        if self.names is None:
            if isinstance(features, (Tensor, Mapping)) or len(features) != len(self.dims):
                raise ValueError(
                    f"features: got {describe(features)}, expected a sequence of {len(self.dims)} tensors"
                )
            given: list[Any] = list(features)
        elif type(features) is dict and list(features) == self.names:  # as usual, without slower checks
            given = list(features.values())
        else:
            if not isinstance(features, Mapping) or set(features) != set(self.names):
                raise ValueError(
                    f"features: got {describe(features)}, expected a dict with the keys {self.names}"
                )
            given = [features[name] for name in self.names]
        first = given[0]
        if not isinstance(first, Tensor):
            first = next((z for z in given if isinstance(z, Tensor)), None)
        batch = () if first is None else first.shape[:-1]
        complete = mask is None
        for name, z, dim in zip(self.names or range(len(given)), given, self.dims, strict=True):
            if z is None and first is not None:
                complete = False
            elif not isinstance(z, Tensor) or z.dim() < 2 or z.shape[-1] != dim:
                got = f"shape {list(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
                raise ValueError(f"features[{name!r}]: got {got}, expected [B, {dim}] or [B, d1, ..., {dim}]")
            elif z.shape[:-1] != batch:
                raise ValueError(
                    f"features[{name!r}]: got shape {list(z.shape)}, expected {[*batch, dim]}, the batch and "
                    "positions of the first modality's features"
                )
        return (given, None) if complete else self._without_absent(given, first, mask)

    def _without_absent(
        self, given: list[Any], first: Any, mask: Tensor | None
    ) -> tuple[list[Tensor], Tensor]:
        """Features with zeros where the mask is False or None stands for a modality; the mask with both."""
        if mask is None:
            mask = torch.ones(first.shape[0], len(given), dtype=torch.bool, device=first.device)
        else:
            check_mask(mask, first, len(given))
        if any(z is None for z in given):
            columns = zip(mask.unbind(1), given, strict=True)
            mask = torch.stack([torch.zeros_like(c) if z is None else c for c, z in columns], 1)
        tensors = [
            first.new_zeros(*first.shape[:-1], dim) if z is None else z.masked_fill(absent(mask, m, z), 0)
            for m, (z, dim) in enumerate(zip(given, self.dims, strict=True))
        ]
        return tensors, mask

    def forward(self, features: Features, mask: Tensor | None = None) -> BranchLogits:
        """Features [B, D_m] -> BranchLogits with logits [B, C]; [B, d1, ..., D_m] -> [B, C, d1, ...].

        Args:
            features: a dict or a sequence as in the constructor. None for a modality that the whole batch
                lacks.
            mask: [B, M] bool, False where a modality is absent. Such features count as zeros, whatever they
                hold, NaN included; the fused logits see zeros there, and the unimodal logits are NaN, since
                no prediction exists. The link takes the mask along to the loss. Where it cannot, in
                torch.compile, under DataParallel or with a link of your own, give the loss the mask too, or
                it becomes NaN.
        """
        tensors, mask = self._as_list(features, mask)
        tensors, link = modulate(tensors)
        if not torch.compiler.is_compiling():
            if self.names is not None:
                link.modalities = tuple(self.names)  # type: ignore[attr-defined]
            if mask is not None:
                link.mask = mask  # type: ignore[attr-defined]
        fused, unimodal = self.branches(tensors)
        # layers leave the classes in the last dimension, the loss takes them in dimension 1
        if fused.dim() > 2:
            fused, unimodal = fused.movedim(-1, 1), [x.movedim(-1, 1) for x in unimodal]
        if mask is not None:
            unimodal = no_prediction(unimodal, mask)
        named_unimodal = unimodal if self.names is None else dict(zip(self.names, unimodal, strict=True))
        return BranchLogits(fused, named_unimodal, link)

    def branches(self, features: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Fused and M unimodal logits [B, d1, ..., C] of features [B, d1, ..., D_m], without a link."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"features={dict(zip(self.names, self.dims, strict=True)) if self.names else self.dims}"


def absent(mask: Tensor, m: int, like: Tensor) -> Tensor:
    """Where modality m is absent, [B, 1, ...] with as many dimensions as ``like``."""
    return ~mask[:, m].view(-1, *[1] * (like.dim() - 1))


def no_prediction(unimodal: Sequence[Tensor], mask: Tensor) -> list[Tensor]:
    """NaN where a modality is absent: a loss that is not told of it does not count such a row in silence."""
    return [x.masked_fill(absent(mask, m, x), torch.nan) for m, x in enumerate(unimodal)]


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
        """``loss, stats = head.loss(features, target)`` in place of ``criterion(head(features), target)``.

        Never holds more than a chunk of logits (``linear_arl_loss``). The layers' parameters are read
        directly: forward hooks on the layers do not run, and layers that compute something else than W z + b
        (LoRA's, quantised ones) are refused.

        Args:
            features, mask: as for the head, with zeros for absent features. The loss gets the mask too.
            target, chunk: as for ``linear_arl_loss``.
            criterion: the ARLLoss whose options, class weights and warm-up count; None: ``options``.
            options: those of ``linear_arl_loss``, where no criterion is given.

        Returns:
            loss and BranchStats, which are also in ``criterion.stats``.
        """
        tensors: Any
        tensors, mask = self._as_list(features, mask)
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
        stats = criterion.stats
        assert stats is not None
        return loss, stats


def _same_dims(dims: list[int], head: str) -> int:
    if len(set(dims)) != 1:
        raise ValueError(f"features: {head} needs one feature size for all modalities, got {dims}")
    return dims[0]


def is_plain_linear(layer: nn.Module, weight: Any) -> bool:
    """Whether a layer with this weight computes F.linear(z, weight, bias) with plain tensors."""
    return type(layer).forward is nn.Linear.forward and type(weight) in (nn.Parameter, Tensor)


def _parameters_of(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """W and b of a layer that computes W z + b with them and nothing else."""
    weight: Any = layer.weight
    if not is_plain_linear(layer, weight):
        raise TypeError(
            f"head.loss: got a {type(layer).__name__} in the head, whose weight alone does not tell what it "
            "computes: use criterion(head(features), target), which calls the layer, or merge it into an "
            "nn.Linear"
        )
    return weight, layer.bias  # type: ignore[return-value]


class ConcatHead(_LinearHead):
    """One linear layer over the concatenated features: x_f = sum_m W_m z_m + b.

    A unimodal branch is the same layer with the other features at zero, x_m = W_m z_m + b (``bias="full"``,
    as in the release) or, so that the branches sum up to the fused logits, x_m = W_m z_m + b / M
    (``bias="split"``).

    The layer may be wrapped or replaced, as LoRA and quantisation do, may carry hooks or be parametrised:
    whatever is not an ``nn.Linear`` of plain tensors is called, once per branch. A state_dict of an
    ``nn.Linear`` in the same place loads.

    Args:
        features: feature size by modality, as {"audio": 512, "visual": 512} or [512, 512].
        num_classes: C.
        bias: "full", "split", or False for none.

    Attributes:
        linear: the ``torch.nn.Linear``, with weight [C, sum D_m] and bias [C] or None.
        weight, bias: those of ``linear``, to be read.
    """

    fusion = "concat"
    linear: nn.Linear

    def __init__(self, features: Dims, num_classes: int, bias: str | bool = "full") -> None:
        super().__init__(features)
        if bias not in ("full", "split", False):
            raise ValueError(f"bias: got {bias!r}, expected 'full', 'split' or False")
        self.bias_mode = bias
        self.linear = nn.Linear(sum(self.dims), num_classes, bias=bias is not False)
        self.register_load_state_dict_pre_hook(_accept_bare_linear)

    @classmethod
    def from_linear(cls, linear: nn.Linear, features: Dims, bias: str = "full") -> ConcatHead:
        """A head around a layer that exists, as the last one of a trained model; the layer itself, not a
        copy.

        Args:
            linear: what maps the concatenated features [B, sum D_m] to logits [B, C].
            features: feature sizes by modality, in the order of the concatenation.
            bias: "full" or "split"; without effect for a layer that has no bias.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: got {type(linear).__name__}, expected a torch.nn.Linear")
        with torch.device("meta"):
            head = cls(features, 1, bias)
        if sum(head.dims) != linear.in_features:
            raise ValueError(
                f"features: got sizes {head.dims}, which add up to {sum(head.dims)}, expected the layer's "
                f"{linear.in_features} input features"
            )
        head.bias_mode = bias if linear.bias is not None else False
        head.linear = linear
        return head

    @property
    def weight(self) -> Tensor:
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        return self.linear.bias

    def branches(self, features: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        linear = self.linear
        weight, bias = linear.weight, linear.bias
        if not is_plain_linear(linear, weight) or has_hooks(linear):
            return self._called(features)
        parts = [F.linear(z, w) for z, w in zip(features, weight.split(self.dims, 1), strict=True)]
        fused = _sum(parts)
        if bias is None:
            return fused, parts
        shared = bias.to(fused.dtype)  # under autocast: adding float32 would make float32 logits
        own = shared if self.bias_mode == "full" else shared / len(parts)
        return fused + shared, [part + own for part in parts]

    def _called(self, features: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The branches by their definition: the layer on features of which all but one are zero."""
        zeros = [torch.zeros_like(z) for z in features]
        fused, *unimodal = (
            self.linear(torch.cat(given, -1))
            for given in (features, *([*zeros[:m], z, *zeros[m + 1 :]] for m, z in enumerate(features)))
        )
        if self.bias_mode == "split":
            bias = self.linear(fused.new_zeros(1, sum(self.dims), dtype=features[0].dtype))
            unimodal = [x - bias * (1 - 1 / len(features)) for x in unimodal]
        return fused, unimodal

    def weights_and_bias(self) -> tuple[Any, Any]:
        return _parameters_of(self.linear)


def _accept_bare_linear(head: nn.Module, state: dict, prefix: str, *_: Any) -> None:
    """State of a layer in the head's place, or of a head that had no layer of its own: add "linear."."""
    for name in ("weight", "bias"):
        if prefix + name in state:
            state[f"{prefix}linear.{name}"] = state.pop(prefix + name)


class SumHead(_LinearHead):
    """One linear layer per modality, added: x_m = W_m z_m + b_m, x_f = sum_m x_m (the release's "sum").

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
        weights, biases = zip(*map(_parameters_of, self.layers), strict=True)
        return list(weights), None if biases[0] is None else list(biases)


class SharedHead(_LinearHead):
    """One linear layer for all: x_m = W z_m + b, x_f = sum_m x_m; b counts M times, as in the release.

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
        return _parameters_of(self.layer)


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
    """Any fusion: the fused logits are ``fusion(features)``, modality m's the same with all other features
    absent.

    One call per branch, M+1 in all; use a linear head where the fusion is linear.

    Where the fusion has BatchNorm, the unimodal passes normalise with their own batch, as every pass in
    training does, but leave the running statistics alone: these are then the fused pass's, which evaluation
    of the whole model needs. The unimodal evaluation pays for it. docs/intermediate.md has the numbers;
    LayerNorm has neither problem.

    Args:
        fusion: a callable (an ``nn.Module`` is registered) from features, a dict or a list as given, to
            logits. A modality's entry is a list of tensors where it came as one.
        absent: what stands for an absent modality.
            "zeros": zeros of the feature's shape.
            "mask": zeros too, and the fusion is called as ``fusion(features, mask)`` with mask [B, M] bool,
            False where a modality is absent: for attention, pooling, or whatever can leave entries out.
            Tensors by modality, a dict or a sequence, each of a shape that expands to the feature's: a fixed
            stand-in, or with ``nn.Parameter(torch.zeros(D_m))`` a learned token, a parameter of this head.
            A callable ``absent(name, z)``, with a name or position, to a tensor of z's shape (an
            ``nn.Module`` is registered).
        track_unimodal: whether unimodal passes update running statistics too, as they would by themselves.
            Modules are found in a fusion that is a module, a module's method, or a function that closes over
            modules.
    """

    def __init__(
        self,
        fusion: Callable[..., Tensor],
        absent: str | Mapping[str, Tensor] | Sequence[Tensor] | Callable[[Any, Tensor], Tensor] = "zeros",
        track_unimodal: bool = False,
    ) -> None:
        super().__init__()
        if not callable(fusion):
            raise TypeError(
                f"fusion: got {type(fusion).__name__}, expected a callable from features to logits"
            )
        self.fusion = fusion
        self.track_unimodal = track_unimodal
        self.absent: Any = absent
        if isinstance(absent, str):
            check_choice("absent", absent, ("zeros", "mask"), ", tensors by modality or a callable")
        elif isinstance(absent, (Mapping, Sequence)):
            self.absent = "tokens"
            tokens = absent if isinstance(absent, Mapping) else dict(enumerate(absent))
            for name, token in tokens.items():
                if not isinstance(token, Tensor):
                    raise TypeError(f"absent[{name!r}]: got {type(token).__name__}, expected a Tensor")
                if isinstance(token, nn.Parameter):
                    self.register_parameter(f"absent_{name}", token)
                else:
                    self.register_buffer(f"absent_{name}", token)
        elif not callable(absent):
            raise TypeError(
                f"absent: got {describe(absent)}, expected 'zeros', 'mask', tensors by modality or a callable"
            )

    if TYPE_CHECKING:

        def __call__(self, features: Any, mask: Tensor | None = None) -> BranchLogits: ...

    def forward(self, features: Any, mask: Tensor | None = None) -> BranchLogits:
        """Features of any shape by modality -> BranchLogits of whatever shape the fusion returns.

        Args:
            features: a tensor per modality or a list of them, with the batch in dimension 0; a dict or a
                sequence.
            mask: [B, M] bool, False where a modality is absent, whose features, NaN included, are then
                replaced as ``absent`` says. The unimodal logits are NaN there; the link takes the mask along,
                as in the other heads.
        """
        features, link = modulate(features)
        by_name = isinstance(features, dict)
        names: list[Any] = list(features) if by_name else list(range(len(features)))
        given = [features[name] for name in names]
        stand_in = [self._absent(name, z) for name, z in zip(names, given, strict=True)]
        first = given[0][0] if isinstance(given[0], list) else given[0]
        if mask is not None:
            check_mask(mask, first, len(names))
            given = [
                _chosen(mask, m, z, other) for m, (z, other) in enumerate(zip(given, stand_in, strict=True))
            ]
            if not torch.compiler.is_compiling():
                link.mask = mask  # type: ignore[attr-defined]

        def fused_of(values: list[Any], alone: int | None) -> Tensor:
            # containers of its own, which the fusion may change
            values = [list(z) if isinstance(z, list) else z for z in values]
            arguments: list[Any] = [dict(zip(names, values, strict=True)) if by_name else values]
            if self.absent == "mask":
                present = (
                    first.new_ones(first.shape[0], len(names), dtype=torch.bool) if mask is None else mask
                )
                if alone is not None:
                    columns = torch.arange(len(names), device=first.device)
                    present = present & (columns == alone)
                arguments.append(present)
            return self.fusion(*arguments)

        versions = _versions(given)
        fused = fused_of(given, None)
        if _versions(given) != versions:
            raise RuntimeError(
                "fusion: wrote into its features in place, which the unimodal branches read after it: write "
                "x = x + y for x += y"
            )
        frozen = [] if self.track_unimodal or not self.training else _tracking(self.fusion)
        for layer in frozen:
            layer.track_running_stats = False
        try:
            unimodal = [fused_of([*stand_in[:m], z, *stand_in[m + 1 :]], m) for m, z in enumerate(given)]
        finally:
            for layer in frozen:
                layer.track_running_stats = True
        if mask is not None:
            unimodal = no_prediction(unimodal, mask)
        return BranchLogits(fused, dict(zip(names, unimodal, strict=True)) if by_name else unimodal, link)

    def _absent(self, name: Any, z: Any) -> Any:
        """What stands for the feature z of an absent modality, or for its several features."""
        if isinstance(z, list):
            return [self._absent(name, x) for x in z]
        if isinstance(self.absent, str) and self.absent != "tokens":
            return torch.zeros_like(z)
        if callable(self.absent):
            other = self.absent(name, z)
            if not isinstance(other, Tensor) or other.shape != z.shape:
                raise ValueError(
                    f"absent: the callable returned {describe(other)} for {name!r}, expected the shape of "
                    f"the feature, {list(z.shape)}"
                )
            return other
        token = getattr(self, f"absent_{name}", None)
        if token is None:
            raise ValueError(f"absent: got no tensor for the modality {name!r}")
        return token.to(z.dtype).expand_as(z)


def _chosen(mask: Tensor, m: int, z: Any, other: Any) -> Any:
    """A modality's features, or what stands for them where the mask says that they are absent."""
    if isinstance(z, list):
        return [_chosen(mask, m, x, o) for x, o in zip(z, other, strict=True)]
    return torch.where(absent(mask, m, z), other, z)


def _versions(features: list[Any]) -> list[int]:
    """How often each tensor was written to; none when compiled, and in inference mode, which do not count."""
    if torch.compiler.is_compiling():
        return []
    flat = [x for z in features for x in (z if isinstance(z, list) else [z])]
    return [x._version for x in flat if not x.is_inference()]


def _tracking(fusion: Callable) -> list[Any]:
    """The layers of a fusion that keep running statistics: BatchNorm, InstanceNorm, or others like them."""
    cells = [cell.cell_contents for cell in getattr(fusion, "__closure__", None) or ()]
    owners = [fusion, getattr(fusion, "__self__", None), *cells]
    modules = {m: None for owner in owners if isinstance(owner, nn.Module) for m in owner.modules()}
    return [m for m in modules if getattr(m, "track_running_stats", False)]


def _sum(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
