"""Which implementation serves a tensor, and why.

Chosen per tensor: the first available of the device's list. ``ARL_FAST_IMPL=reference|native|triton``
overrides.
"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .._core._torch import constant_for_compiler
from .._core.options import Options, Schedule, is_plain
from . import reference

# Where each lies, below this folder. A new implementation needs a line here and a place in PREFERENCE.
MODULES = {"reference": ".reference", "native": ".native", "triton": ".triton.host"}
# Fastest first; docs/performance.md has the measurements behind the order.
PREFERENCE = {"cpu": ("native", "reference"), "cuda": ("native", "triton", "reference")}

# What ARL_FAST_IMPL asks for: a name of MODULES, or None for the first that is available. Tests put an object
# of the contract here.
override: Any = os.environ.get("ARL_FAST_IMPL") or None
if override == "auto":
    override = None

_loaded: dict[str, ModuleType] = {"reference": reference}


@functools.cache
def load(name: str, device: str) -> tuple[ModuleType | None, str]:
    """The implementation's module, or None and the reason why it cannot serve this type of device."""
    if name not in MODULES:
        raise ValueError(f"ARL_FAST_IMPL: got {name!r}, expected one of {', '.join(MODULES)} or auto")
    if name == "reference":
        return reference, "plain torch runs everywhere"
    try:
        module = importlib.import_module(MODULES[name], __package__)
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


@constant_for_compiler
def _name(device: str, name: str | None) -> str:
    return choose(device, name)[0]


def for_tensor(x: Tensor) -> Any:
    """The implementation for tensors like ``x``."""
    if override is None or isinstance(override, str):
        return _loaded[_name(x.device.type, override)]
    return override


def for_loss(logits: Tensor, options: Options, schedule: Schedule) -> Any:
    """The implementation for a loss over tensors like ``logits``."""
    return reference if is_plain(options, schedule) else for_tensor(logits)


@functools.cache
def _native_steps(name: Any) -> ModuleType | None:
    return load("native", "cpu")[0] if name in (None, "native") else None


def native_steps() -> ModuleType | None:
    """The module whose ``fast_...`` functions serve usual eager steps on a CPU in one call, or None."""
    return None if is_dynamo_compiling() else _native_steps(override)


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
