"""The native kernels (csrc/): the contract's functions over ``arl_fast._C``, and one call for eager steps.

Eager calls go straight to the extension; torch.compile sees the ops ``torch.ops.arl_fast.native_*``.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._core import rules, spec
from .._core.branches import BranchLogits, Targets
from .._core.checks import LinearHead
from .._core.options import Options, Schedule
from . import ops, reference

MAX_BRANCHES = {"cpu": 64, "cuda": 16}  # kMaxBranches in csrc/cpu/loss.h and csrc/cuda/launch.h
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_note = Path(__file__).parents[1] / "native_build.txt"  # what setup.py left out, and why
_left_out = f" ({_note.read_text().strip()})" if _note.exists() else ""


def _expected() -> dict[str, Any]:
    """What the extension must have been compiled with (csrc/spec.h), by the sources of Python."""
    names = ("RULES", "DEPENDENCES", "GAINS", "REDUCTIONS", "FUSIONS", "BIAS_MODES", "TASKS")
    facts = {name: getattr(spec, name) for name in (*names, "SUMS", "PACKED", "PER_BRANCH", "CONSTANTS")}
    for kind in (Options, Targets, Schedule, BranchLogits, LinearHead):
        facts[kind.__name__] = kind._fields  # type: ignore[attr-defined]
    for function in (reference.forward, reference.scale, reference.modulate_backward):
        facts[function.__name__] = tuple(inspect.signature(function).parameters)
    facts["fast_loss"] = ("options", "branches", "targets", "schedule")
    facts["fast_criterion"] = ("criterion", "output", "target", "mask")
    facts["fast_linear_loss"] = ("options", "head", "targets", "schedule", "budget")
    facts["fast_modulate"] = ("features",)
    facts["fast_unpack"] = ("packed",)
    return facts


def _stale(extension: Any) -> str:
    """What of the extension was compiled from other sources, or for another torch, than these; or nothing."""
    here = ".".join(torch.__version__.split(".")[:2])
    built_for = getattr(extension, "torch", here)
    if built_for != here:  # its calls into torch's libraries would go wrong, in any way
        return f"arl_fast._C was built for torch {built_for}, this is torch {here}; build it again"
    compiled = getattr(extension, "spec", {})
    for name, fact in _expected().items():
        if name not in compiled:
            return f"arl_fast._C does not know {name}: it was built from other sources; build it again"
        if compiled[name] != fact:
            return (
                f"arl_fast._C was built from other sources, with {name} = {compiled[name]}, where these have "
                f"{fact}: build it again"
            )
    return ""


_C: Any = None
try:
    from .. import _C  # type: ignore[attr-defined, no-redef]
except ImportError as error:
    _absent = f"{error}{_left_out}; build it with pip install --no-build-isolation ."
else:
    _absent = _stale(_C)
    _C = None if _absent else _C

# Usual eager steps, checked, computed and recorded for autograd in one call (csrc/eager/steps.h), the linear
# head's on a CPU only:
#   fast_loss(options, branches, targets, schedule) -> (loss, packed)
#   fast_criterion(criterion, output, target, mask) -> loss, with the attributes as after ARLLoss.forward
#   fast_linear_loss(options, head, targets, schedule, budget) -> (loss, packed)
#   fast_modulate([z_1, ...]) -> ([z_1, ...], link)
#   fast_unpack(packed) -> what BranchStats holds
# All return None for the general path, ``_autograd``, to serve or diagnose the call.
fast_loss: Any = getattr(_C, "fast_loss", None)
fast_criterion: Any = getattr(_C, "fast_criterion", None)
fast_linear_loss: Any = getattr(_C, "fast_linear_loss", None)
fast_modulate: Any = getattr(_C, "fast_modulate", None)
fast_unpack: Any = getattr(_C, "fast_unpack", None)


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


def forward(
    logits: Sequence[Tensor], targets: Targets, schedule: Schedule, options: Options, grad: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """As reference.forward."""
    first = logits[0]
    if len(logits) > MAX_BRANCHES[first.device.type] or first.dtype not in _DTYPES:
        return reference.forward(logits, targets, schedule, options, grad)
    if torch.compiler.is_compiling():
        results = ops.forward("native", logits, targets, schedule, options, grad)
    else:
        run = _C.cuda_forward if first.is_cuda else _C.forward
        results = run(logits, targets, schedule, options.for_kernels, grad)
    if isinstance(options.rule, str):
        return results
    loss, packed, grads = results
    return loss, rules.apply_rule(packed, schedule, options), grads


def scale(
    grads: Sequence[Tensor], upstream: Tensor, factor: Tensor | None, dtype: torch.dtype, keep: bool
) -> Sequence[Tensor]:
    """As reference.scale; without ``keep`` the result may be ``grads`` themselves, scaled in place."""
    if len(grads) > MAX_BRANCHES[grads[0].device.type]:
        return reference.scale(grads, upstream, factor, dtype, keep)
    if torch.compiler.is_compiling():
        return ops.scale("native", grads, upstream, factor, dtype)
    run = _C.cuda_scale if grads[0].is_cuda else _C.scale
    return run(grads, upstream, factor, dtype, keep)


def modulate_backward(grads: Sequence[Tensor | None], link: Tensor) -> Sequence[Tensor | None]:
    """As reference.modulate_backward."""
    if torch.compiler.is_compiling():
        return ops.modulate_backward("native", grads, link)
    run = _C.cuda_modulate_backward if link.is_cuda else _C.modulate_backward
    return ops.for_present(grads, lambda given, modalities: run(given, modalities, link))


def _cuda_scale(
    grads: Sequence[Tensor], upstream: Tensor, factor: Tensor | None, dtype: torch.dtype
) -> list[Tensor]:
    return _C.cuda_scale(grads, upstream, factor, dtype, True)


if _C is not None:
    ops.define("native")  # csrc/ops.cpp runs them on a CPU
    if hasattr(_C, "cuda_forward"):
        ops.implement("native", _C.cuda_forward, _cuda_scale, _C.cuda_modulate_backward, "CUDA")
