"""The native kernels (csrc/): the contract's three functions over ``arl_fast._C``, and the short way for eager steps.

Eager calls go straight to the extension; torch.compile sees the registered ops ``torch.ops.arl_fast.*``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._core import rules
from .._core._torch import current_stream
from .._core.branches import BranchLogits, Targets
from .._core.dtypes import compute_dtype, grad_dtype
from .._core.options import Options, Schedule
from .._core.spec import DEPENDENCES, GAINS, REDUCTIONS, RULES
from .._core.stats import packed_length
from . import reference

MAX_BRANCHES = {"cpu": 64, "cuda": 16}  # kMaxBranches in csrc/cpu/loss.h and csrc/cuda/launch.h
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

INTERFACE = 2  # of arl_fast._C, see csrc/bindings.cpp

_note = Path(__file__).parents[1] / "native_build.txt"  # what setup.py left out, and why
_left_out = f" ({_note.read_text().strip()})" if _note.exists() else ""

_C: Any = None
_absent = ""
try:
    from .. import _C  # type: ignore[attr-defined, no-redef]
except ImportError as error:
    _absent = f"{error}{_left_out}; build it with pip install --no-build-isolation ."
else:
    _here = ".".join(torch.__version__.split(".")[:2])
    if getattr(_C, "torch", _here) != _here:  # its calls into torch's libraries would go wrong, in any way
        _absent = f"arl_fast._C was built for torch {_C.torch}, this is torch {_here}; build it again"
        _C = None
    elif getattr(_C, "interface", 0) != INTERFACE:
        _C, _absent = None, "arl_fast._C was built from another version of the sources; build it again"

# The usual eager step on a CPU, checked, computed and recorded for autograd in one call (csrc/autograd.h): fast_loss(options,
# fused, unimodal, target, link, mask, weight, gamma, temperature, warming) -> (loss, packed), fast_linear_loss(options, fusion,
# bias_mode, chunk, budget, features, weights, bias, target, mask, weight, gamma, temperature, warming) -> (loss, packed), and
# fast_modulate([z_1, ...]) -> ([z_1, ...], link). All return None for the general path, functional.py or linear.py, to serve
# or diagnose the call.
fast_modulate = getattr(_C, "fast_modulate", None)


def fast_loss(options: Options, branches: BranchLogits, targets: Targets, schedule: Schedule) -> Any:
    """Interim."""
    fused, unimodal, link = branches
    target, mask, weight, _ = targets
    return _C.fast_loss(
        options,
        fused,
        unimodal,
        target,
        link,
        mask,
        weight,
        schedule.gamma,
        schedule.temperature,
        schedule.warming,
    )


def fast_linear_loss(options: Options, head: Any, targets: Targets, schedule: Schedule, budget: int) -> Any:
    """Interim."""
    features, weights, bias, fusion, bias_mode, chunk = head
    target, mask, weight, _ = targets
    return _C.fast_linear_loss(
        options,
        fusion,
        bias_mode,
        chunk,
        budget,
        features,
        weights,
        bias,
        target,
        mask,
        weight,
        schedule.gamma,
        schedule.temperature,
        schedule.warming,
    )


def _interim(schedule: Schedule, like: Tensor) -> tuple[Tensor | None, float, float, bool]:
    """Interim: one tensor [3], or three numbers."""
    if not schedule.tensors:
        return None, schedule.gamma, schedule.temperature, schedule.warming
    values = (schedule.gamma, schedule.temperature, schedule.warming)
    dtype = compute_dtype(like.dtype)
    return torch.stack([torch.as_tensor(v, dtype=dtype).to(like.device) for v in values]), 0.0, 0.0, False


def unavailable(device: str) -> str | None:
    """Why the extension cannot serve this type of device, or None."""
    if _C is None:
        return _absent
    if device == "cuda" and torch.version.hip is not None:
        return "the CUDA kernels are not for ROCm"
    if device not in MAX_BRANCHES or (device == "cuda" and not hasattr(_C, "cuda_forward")):
        return f"arl_fast._C was built without kernels for {device}{_left_out}"
    return None


def describe(device: str) -> str:
    """One line for ``python -m arl_fast``."""
    if device == "cuda":
        return "arl_fast._C, CUDA kernels"
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
    logits: Sequence[Tensor], targets: Targets, schedule: Schedule, options: Options, grad: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """As reference.forward."""
    per_modality = isinstance(schedule.gamma, tuple) or (
        isinstance(schedule.gamma, Tensor) and schedule.gamma.dim()
    )
    if len(logits) > MAX_BRANCHES[logits[0].device.type] or logits[0].dtype not in _DTYPES or per_modality:
        return reference.forward(logits, targets, schedule, options, grad)
    numbers = _interim(schedule, logits[0])
    if torch.compiler.is_compiling():
        loss, packed, grads = torch.ops.arl_fast.forward(
            logits, *targets, *numbers, *_numbers.__wrapped__(options), grad
        )
    else:
        arguments = (logits, *targets, *numbers, _native_options(options), grad)
        loss, packed, grads = _cuda_forward(*arguments) if logits[0].is_cuda else _C.forward(*arguments)
    if not isinstance(options.rule, str):
        packed = rules.apply_rule(packed, schedule, options)
    return loss, packed, grads


def scale(
    grads: Sequence[Tensor], upstream: Tensor, factor: Tensor | None, dtype: torch.dtype, keep: bool
) -> Sequence[Tensor]:
    """As reference.scale; without ``keep`` the result may be ``grads`` themselves, scaled in place."""
    if len(grads) > MAX_BRANCHES[grads[0].device.type]:
        return reference.scale(grads, upstream, factor, dtype, keep)
    if torch.compiler.is_compiling():
        return torch.ops.arl_fast.scale(grads, upstream, factor, dtype)
    if grads[0].is_cuda:
        return _C.cuda_scale(grads, upstream, factor, dtype, not keep, _stream(upstream))
    return _C.scale(grads, upstream, factor, dtype, not keep)


def modulate_backward(grads: Sequence[Tensor | None], link: Tensor) -> Sequence[Tensor | None]:
    """As reference.modulate_backward."""
    modality = [m for m, g in enumerate(grads) if g is not None]
    given = [grads[m] for m in modality]
    if torch.compiler.is_compiling():
        results = torch.ops.arl_fast.modulate_backward(given, link, modality)
    elif link.is_cuda:
        results = _C.cuda_modulate_backward(given, link, modality, _stream(link))
    else:
        results = _C.modulate_backward(given, link, modality)
    modulated = dict(zip(modality, results, strict=True))
    return [modulated.get(m) for m in range(len(grads))]


def _stream(x: Tensor) -> int:
    """The current stream of the tensor's device, as the address that the launchers take."""
    return current_stream(x.device.index)


_tickets: dict[tuple[int, int], Tensor] = {}


def _ticket(x: Tensor, stream: int) -> Tensor | None:
    """The counter with which the last block of a launch finds itself: one per stream, which every launch leaves at 0.

    None while a graph is captured: the graph may be replayed on another stream, so its launches zero counters of their own.
    """
    if torch._C._cuda_isCurrentStreamCapturing():
        return None
    key = (x.device.index, stream)
    if key not in _tickets:
        _tickets[key] = torch.zeros(1, dtype=torch.int32, device=x.device)
    return _tickets[key]


def _cuda_forward(logits: Sequence[Tensor], *arguments: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    stream = _stream(logits[0])
    return _C.cuda_forward(logits, *arguments, stream, _ticket(logits[0], stream))


def _register_cuda() -> None:
    """The registered ops on CUDA tensors; on a CPU csrc/ops.cpp registers them."""

    def forward_op(logits: Sequence[Tensor], *arguments: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
        *inputs, grad = arguments
        return _cuda_forward(logits, *inputs[:-7], _C.Options(*inputs[-7:]), grad)

    def scale_op(
        grads: Sequence[Tensor], upstream: Tensor, factor: Tensor | None, dtype: torch.dtype
    ) -> list[Tensor]:
        return _C.cuda_scale(grads, upstream, factor, dtype, False, _stream(upstream))

    def modulate_op(grads: Sequence[Tensor], link: Tensor, modality: Sequence[int]) -> list[Tensor]:
        return _C.cuda_modulate_backward(grads, link, modality, _stream(link))

    torch.library.impl("arl_fast::forward", "CUDA", forward_op)
    torch.library.impl("arl_fast::scale", "CUDA", scale_op)
    torch.library.impl("arl_fast::modulate_backward", "CUDA", modulate_op)


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
    if hasattr(_C, "cuda_forward"):
        _register_cuda()
