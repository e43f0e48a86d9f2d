"""``modulate`` and the link: how a gain that is computed after the head reaches the encoder before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from .._core import checks
from .._core.stats import link_gradient
from ..implementations import dispatch


def recorded(tensors: Sequence[Tensor | None]) -> bool:
    """Whether autograd records what is computed from any of these.

    A Function is applied only then. Elsewhere torch.compile calls ``forward`` itself, and drops its ``ctx``
    where the number of arguments happens to be that of the parameters, ``*varargs`` counted as one (torch
    2.13).
    """
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def new_link(features: Sequence[Tensor]) -> Tensor:
    """A zero vector [M], float64 if any feature is, else float32."""
    dtype = torch.float64 if any(z.dtype == torch.float64 for z in features) else torch.float32
    return torch.zeros(len(features), dtype=dtype, device=features[0].device)


def for_link(link: Tensor, packed: Tensor) -> Tensor:
    """gains - 1, repeated as the link is: DataParallel concatenates the links of its replicas."""
    gradient = link_gradient(packed)
    return gradient if link.shape == gradient.shape else gradient.repeat(link.shape[0] // gradient.shape[0])


class _Modulate(torch.autograd.Function):
    """Identity on the features. The gradient of an extra output, the link, scales theirs in backward."""

    @staticmethod
    def forward(ctx: Any, *features: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return (*(z.view_as(z) for z in features), new_link(features))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *features, link = grads
        first = next((g for g in features if g is not None), None)
        if link is None or first is None:  # no loss has used the link, or no feature
            return tuple(features)
        return tuple(dispatch.for_tensor(first).modulate_backward(features, link))


@overload
def modulate(features: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]: ...
@overload
def modulate(features: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]: ...
def modulate(
    features: Mapping[str, Tensor] | Sequence[Tensor],
) -> tuple[dict[str, Tensor] | list[Tensor], Tensor]:
    """Mark the point at which the gradient of each modality's encoder is to be scaled.

    The features come back unchanged. Give the link to the loss that is computed from them: in backward the
    gradient that reaches modality m through its features is then multiplied by the gain of the same step (Eq.
    19 of the paper). A link that no loss uses is harmless.

    Args:
        features: one floating-point tensor of any shape per modality, all on one device; a dict by name or a
            sequence.

    Returns:
        The features, in a dict or a list as they came, and the link, a zero vector [M] of float32 (float64 if
        any feature is float64). Where several losses use one link, their gains minus one add up.

    Raises:
        TypeError, ValueError: not a dict or sequence of floating-point tensors, none given, or several
            devices.
    """
    named = checks.named_tensors("features", features)
    checks.refuse_transforms("modulate")
    tensors = list(named.values())
    native = dispatch.native_steps()
    result = None if native is None else native.fast_modulate(tensors)
    if result is not None:
        tensors, link = result
    elif recorded(tensors):
        *tensors, link = _Modulate.apply(*tensors)
    else:
        link = new_link(tensors)
    if isinstance(features, Mapping):
        if not torch.compiler.is_compiling():
            link.modalities = tuple(named)
        return dict(zip(named, tensors, strict=True)), link
    return list(tensors), link
