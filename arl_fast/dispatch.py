"""Which implementation serves a tensor, and why.

Chosen per tensor: the first available of the device's list. ``ARL_FAST_IMPL=reference|native|triton`` overrides.
"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType

import torch
from torch import Tensor

from . import reference
from .options import Options

IMPLEMENTATIONS = {"reference": "arl_fast.reference", "native": "arl_fast.kernels.native", "triton": "arl_fast.kernels.triton"}
# Fastest first; docs/performance.md has the measurements behind the order.
PREFERENCE = {"cpu": ("native", "reference"), "cuda": ("native", "triton", "reference")}

override: str | None = os.environ.get("ARL_FAST_IMPL") or None
if override == "auto":
    override = None


_loaded: dict[str, ModuleType] = {"reference": reference}


@functools.cache
def load(name: str, device: str) -> tuple[ModuleType | None, str]:
    """The implementation's module, or None and the reason why it cannot serve this type of device."""
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"ARL_FAST_IMPL: got {name!r}, expected one of {', '.join(IMPLEMENTATIONS)} or auto")
    if name == "reference":
        return reference, "plain torch runs everywhere"
    try:
        module = importlib.import_module(IMPLEMENTATIONS[name])
    except ImportError as error:
        return None, str(error)
    _loaded[name] = module
    reason = module.unavailable(device)
    return (None, reason) if reason else (module, module.describe(device))


@functools.cache
def choose(device: str, name: str | None = None) -> tuple[str, str]:
    """Name and reason of the implementation for a type of device ("cpu", "cuda", ...)."""
    if name is not None:
        module, reason = load(name, device)
        if module is None:
            raise RuntimeError(f"ARL_FAST_IMPL={name} cannot serve {device}: {reason}")
        return name, f"ARL_FAST_IMPL={name} asks for it; {reason}"
    passed_over: list[str] = []
    for candidate in PREFERENCE.get(device, ("reference",)):
        module, reason = load(candidate, device)
        if module is not None:
            return candidate, "; ".join([reason, *passed_over])
        passed_over.append(f"{candidate} is not used: {reason}")
    raise AssertionError("the reference is always available")


def _name(device: str, name: str | None) -> str:
    return choose(device, name)[0]


# torch.compile must not trace imports and caches: for it the choice is a constant. This is what
# torch.compiler.assume_constant_result sets; calling that would import torch._dynamo with the package.
_name._dynamo_marked_constant = True  # type: ignore[attr-defined]


def for_tensor(x: Tensor) -> ModuleType:
    """The implementation for tensors like ``x``."""
    return _loaded[_name(x.device.type, override)]


def for_loss(fused: Tensor, options: Options, gamma: float | Tensor) -> ModuleType:
    """The implementation for a loss over logits like ``fused``."""
    # A plain cross-entropy, the baseline of every comparison, is torch's own to the last bit.
    if options.rule == "none" and not isinstance(gamma, Tensor) and gamma == 0:
        return reference
    return for_tensor(fused)


@functools.cache
def _native_steps(name: str | None) -> ModuleType | None:
    return load("native", "cpu")[0] if name in (None, "native") else None


def native_steps() -> ModuleType | None:
    """The module whose ``fast_loss`` and ``fast_modulate`` serve usual eager steps on a CPU in one call, or None."""
    return None if torch.compiler.is_compiling() else _native_steps(override)


def report() -> str:
    """What ``python -m arl_fast`` prints."""
    lines = []
    for device in ("cpu", "cuda"):
        if device == "cuda" and not torch.cuda.is_available():
            lines.append("cuda: no device here")
        else:
            name, reason = choose(device, override)
            lines.append(f"{device}: {name} ({reason})")
        for other in PREFERENCE[device]:
            module, reason = load(other, device)
            lines.append(f"  {other}: {'available' if module else 'not available'}, {reason}")
    return "\n".join(lines)
