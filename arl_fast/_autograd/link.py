"""``modulate`` and the link: how a gain that is computed after the head reaches the encoder before it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from .._core import checks, graph
from .._core.stats import link_gradient
from ..implementations import dispatch


def recorded(tensors: Sequence[Tensor | None]) -> bool:
    """Whether autograd records what is computed from any of these.

    A Function is applied only then. Elsewhere torch.compile calls ``forward`` itself, and drops its ``ctx``
    where the number of arguments happens to be that of the parameters, ``*varargs`` counted as one (torch
    2.13).
    """
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def new_link(features: Sequence[Tensor], modalities: int) -> Tensor:
    """A zero vector [M], float64 if any feature is, else float32."""
    dtype = torch.float64 if any(z.dtype == torch.float64 for z in features) else torch.float32
    return torch.zeros(modalities, dtype=dtype, device=features[0].device)


def for_link(link: Tensor, packed: Tensor) -> Tensor:
    """gains - 1 as the link's gradient: DataParallel concatenates the links of its replicas."""
    return for_replicas(link, link_gradient(packed))


def for_replicas(link: Tensor, gradient: Tensor) -> Tensor:
    """A gradient [M] as often as the link holds the modalities."""
    return gradient if link.shape == gradient.shape else gradient.repeat(link.shape[0] // gradient.shape[0])


class _Modulate(torch.autograd.Function):
    """Identity on the features. The gradient of an extra output, the link, scales theirs in backward."""

    @staticmethod
    def forward(ctx: Any, sizes: tuple[int, ...], *features: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.sizes = sizes  # number of features of each modality
        return (*(z.view_as(z) for z in features), new_link(features, len(sizes)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *features, link = grads
        if link is None:  # no loss has used it
            return None, *features
        first = next((g for g in features if g is not None), None)
        if first is None:
            _nothing_to_scale()
            return None, *features
        if len(features) > len(ctx.sizes):  # all features of a modality get its gain
            link = torch.cat([link[m : m + 1].expand(size) for m, size in enumerate(ctx.sizes)])
        return None, *dispatch.for_tensor(first).modulate_backward(features, link)


def _nothing_to_scale() -> None:
    """The loss has used the link, but does not depend on the features: the gains act on nothing."""
    if not torch.compiler.is_compiling():
        warnings.warn(
            "modulate: a loss has used the link, but none of its gradient came through the features that "
            "modulate returned with it, so that its gains scale nothing: give the head the returned "
            "features, not those that went in",
            stacklevel=2,
        )


class _ApplyGains(torch.autograd.Function):
    """Identity on the loss. Backward hands gains - 1 to the link, whatever multiplies the loss."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, link: Tensor, gains: Tensor) -> Tensor:
        ctx.save_for_backward(for_replicas(link, gains - 1))
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        return upstream, *ctx.saved_tensors, None


def apply_gains(loss: Tensor, link: Tensor, gains: Tensor | Sequence[float]) -> Tensor:
    """One's own gains, for any loss: regression, CTC, ranking, or a rule that cross-entropies do not serve.

        features, link = arl_fast.modulate({"audio": za, "visual": zv})
        loss = mse(head(features), y)
        loss = arl_fast.apply_gains(loss, link, gains=[1.2, 1.8])  # audio, visual

    In backward the gradient that reaches modality m through its features is multiplied by gains[m]; the
    head's is not. As in ``arl_loss``, a factor on the returned loss (accumulation, a loss scaler) does not
    touch the gains, and where several losses use one link, their gains minus one add up.

    Args:
        loss: a tensor of any shape that was computed from the features of ``modulate``.
        link: the second result of ``modulate``, [M].
        gains: [M] factors, a tensor on the link's device or numbers. They get no gradient. Nothing is read to
            the host.

    Returns:
        The loss, unchanged. Use it, or the gains reach nobody.

    Raises:
        TypeError, ValueError: a loss or link that is no tensor, or gains of another number than the link has
            entries.
    """
    for name, value in (("loss", loss), ("link", link)):
        if not isinstance(value, Tensor):
            expected = "a Tensor" if name == "loss" else "the second result of arl_fast.modulate"
            raise TypeError(f"{name}: got {type(value).__name__}, expected {expected}")
    checks.refuse_transforms("apply_gains")
    values = torch.as_tensor(gains, dtype=link.dtype, device=link.device).detach()
    if values.dim() != 1 or (link.shape != values.shape and not graph.is_gathered(link, len(values))):
        raise ValueError(
            f"gains: got shape {list(values.shape)}, expected {list(link.shape)}, one gain per entry of the "
            "link"
        )
    return _ApplyGains.apply(loss, link, values) if recorded((link,)) else loss


@overload
def modulate(features: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]: ...
@overload
def modulate(features: Mapping[str, Sequence[Tensor]]) -> tuple[dict[str, list[Tensor]], Tensor]: ...
@overload
def modulate(features: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]: ...
@overload
def modulate(features: Sequence[Sequence[Tensor]]) -> tuple[list[list[Tensor]], Tensor]: ...
@overload
def modulate(features: Any) -> tuple[Any, Tensor]: ...
def modulate(features: Any) -> tuple[Any, Tensor]:
    """Mark the point at which the gradient of each modality's encoder is to be scaled.

    The features come back unchanged. Give the link to the loss that is computed from them: in backward the
    gradient that reaches modality m through its features is then multiplied by the gain of the same step (Eq.
    19 of the paper). A link that no loss uses is harmless.

    Args:
        features: a floating-point tensor of any shape per modality, or a list of them where a modality has
            several (layers, crops, a sequence and its summary), which all get its gain; all on one device. A
            dict by name, or a sequence: {"audio": za, "visual": zv}, {"audio": [a1, a2], "visual": [v1, v2]},
            [za, zv].

    Returns:
        The features, in a dict or a list as they came, with lists inside where they came so, and the link, a
        zero vector [M] of float32 (float64 if any feature is float64). Where several losses use one link,
        their gains minus one add up.

    Raises:
        TypeError, ValueError: not a dict or sequence of floating-point tensors, none given, or several
            devices.
    """
    native = dispatch.native_steps()
    by_name = type(features) is dict
    if native is not None and (by_name or type(features) is list):
        result = native.fast_modulate(list(features.values()) if by_name else features)
        if result is not None:  # None where anything is unusual or wrong
            tensors, link = result
            if not by_name:
                return tensors, link
            link.modalities = names = tuple(features)
            return dict(zip(names, tensors, strict=True)), link
    checked = checks.check_features(features)
    checks.refuse_transforms("modulate")
    tensors = checked.tensors
    if recorded(tensors):
        checks.refuse_tracing("modulate")
        *tensors, link = _Modulate.apply(checked.sizes, *tensors)
    else:
        link = new_link(tensors, len(checked.sizes))
    if checked.names is not None and not torch.compiler.is_compiling():
        link.modalities = tuple(checked.names)
    return checked.as_given(tensors), link
