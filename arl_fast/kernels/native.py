"""The native kernels (csrc/): the contract's three functions over ``arl_fast._C``, and the short way for eager steps.

Eager calls go straight to the extension; torch.compile sees the registered ops ``torch.ops.arl_fast.*``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference, rules
from ..options import DEPENDENCES, GAINS, REDUCTIONS, RULES, Options
from ..reference import compute_dtype, grad_dtype
from ..stats import packed_length

MAX_BRANCHES = 64  # kMaxBranches in csrc/cpu/loss.h
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_C: Any = None
_absent = ""
try:
    from .. import _C  # type: ignore[attr-defined, no-redef]
except ImportError as error:
    _absent = f"arl_fast._C was not built or does not load ({error}); build it with pip install --no-build-isolation ."

# The usual eager step on a CPU, checked, computed and recorded for autograd in one call (csrc/autograd.h): fast_loss(options,
# fused, unimodal, target, link, mask, weight, gamma, temperature, warming) -> (loss, packed), and fast_modulate([z_1, ...])
# -> ([z_1, ...], link). Both return None for the general path of functional.py to serve or diagnose the call.
fast_loss = getattr(_C, "fast_loss", None)
fast_modulate = getattr(_C, "fast_modulate", None)


def unavailable(device: str) -> str | None:
    """Why the extension cannot serve this type of device, or None."""
    if _C is None:
        return _absent
    if device != "cpu":
        return f"arl_fast._C was built without kernels for {device}"
    return None


def describe(device: str) -> str:
    """One line for ``python -m arl_fast``."""
    return f"arl_fast._C, {_C.isa()} (ARL_FAST_ISA chooses among {', '.join(_C.available_isas())})"


@functools.lru_cache(maxsize=256)
def _numbers(options: Options) -> tuple[int, int, float, int, int, float, int]:
    """Options as the numbers of csrc/arl_math.h; a callable rule runs as "constant" here (rules.apply_rule follows)."""
    rule = options.rule if isinstance(options.rule, str) else "constant"
    floor = -1.0 if options.entropy_floor is None else options.entropy_floor
    return (
        RULES.index(rule),
        DEPENDENCES.index(options.dependence),
        floor,
        GAINS.index(options.gain),
        options.ignore_index,
        options.label_smoothing,
        REDUCTIONS.index(options.reduction),
    )


@functools.lru_cache(maxsize=256)
def _native_options(options: Options) -> Any:
    return _C.Options(*_numbers(options))


def forward(
    logits: Sequence[Tensor],
    target: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    norm: Tensor | None,
    schedule: rules.Schedule,
    options: Options,
    grad: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """As reference.forward."""
    if len(logits) > MAX_BRANCHES or logits[0].dtype not in _DTYPES:
        return reference.forward(logits, target, mask, weight, norm, schedule, options, grad)
    tensor = schedule if isinstance(schedule, Tensor) else None
    gamma, temperature, warming = (0.0, 0.0, False) if isinstance(schedule, Tensor) else schedule
    if torch.compiler.is_compiling():
        loss, packed, grads = torch.ops.arl_fast.forward(
            logits, target, mask, weight, norm, tensor, gamma, temperature, warming, *_numbers.__wrapped__(options), grad
        )
    else:
        loss, packed, grads = _C.forward(
            logits, target, mask, weight, norm, tensor, gamma, temperature, warming, _native_options(options), grad
        )
    if not isinstance(options.rule, str):
        packed = rules.apply_rule(packed, schedule, options)
    return loss, packed, grads


def scale(grads: Sequence[Tensor], upstream: Tensor, factor: Tensor | None, dtype: torch.dtype, keep: bool) -> Sequence[Tensor]:
    """As reference.scale; without ``keep`` the result may be ``grads`` themselves, scaled in place."""
    if torch.compiler.is_compiling():
        return torch.ops.arl_fast.scale(grads, upstream, factor, dtype)
    return _C.scale(grads, upstream, factor, dtype, not keep)


def modulate_backward(grads: Sequence[Tensor | None], link: Tensor) -> Sequence[Tensor | None]:
    """As reference.modulate_backward."""
    modality = [m for m, g in enumerate(grads) if g is not None]
    given = [grads[m] for m in modality]
    op = torch.ops.arl_fast.modulate_backward if torch.compiler.is_compiling() else _C.modulate_backward
    modulated = dict(zip(modality, op(given, link, modality), strict=True))
    return [modulated.get(m) for m in range(len(grads))]


def _register_fakes() -> None:
    """Shapes and dtypes of the registered ops, for torch.compile."""

    @torch.library.register_fake("arl_fast::forward")
    def _(
        logits: list[Tensor],
        target: Tensor,
        mask: Tensor | None,
        weight: Tensor | None,
        norm: Tensor | None,
        schedule: Tensor | None,
        gamma: float,
        temperature: float,
        warming: bool,
        rule: int,
        dependence: int,
        entropy_floor: float,
        gain: int,
        ignore_index: int,
        label_smoothing: float,
        reduction: int,
        grad: bool,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        fused = logits[0]
        dtype = compute_dtype(fused.dtype)
        loss = fused.new_empty(fused.shape[:1] if reduction == REDUCTIONS.index("none") else (), dtype=dtype)
        packed = fused.new_empty(packed_length(len(logits) - 1), dtype=dtype)
        grads = [x.new_empty(x.shape, dtype=grad_dtype(x.dtype)) for x in logits] if grad else []
        return loss, packed, grads

    @torch.library.register_fake("arl_fast::scale")
    def _(grads: list[Tensor], upstream: Tensor, factor: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
        return [g.new_empty(g.shape, dtype=dtype) for g in grads]

    @torch.library.register_fake("arl_fast::modulate_backward")
    def _(grads: list[Tensor], link: Tensor, modality: list[int]) -> list[Tensor]:
        return [torch.empty_like(g) for g in grads]


if _C is not None:
    _register_fakes()
