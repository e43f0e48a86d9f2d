"""The options of the loss, checked once: one place knows which values are legal and says so."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

RULES = ("share", "paper", "constant", "none")
DEPENDENCES = ("confidence", "logit_l1")
GAINS = ("residual", "mean_one", "plain")
REDUCTIONS = ("mean", "sum", "none")


class Options(NamedTuple):
    """Everything about the loss that is a plain value and fixed for a run (hashable, so that it can be cached).

    ``entropy_floor`` is None for the default, 0.6 over the number of modalities present in the batch.
    """

    rule: str | Callable
    dependence: str
    entropy_floor: float | None
    gain: str
    ignore_index: int
    label_smoothing: float
    reduction: str

    @property
    def scales(self) -> bool:
        """Whether the rule can give an encoder a gain other than 1, so that a link is needed."""
        return self.rule != "none"


def _choice(name: str, value: object, allowed: tuple[str, ...], extra: str = "") -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, allowed))}{extra}")


def _number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__} {value!r}, expected a number in [{low}, {high}]")
    if not low <= value <= high:
        raise ValueError(f"{name}: got {value}, expected a number in [{low}, {high}]")


def _checked(
    rule: str | Callable,
    dependence: str,
    entropy_floor: float | None,
    gain: str,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> Options:
    if not callable(rule):
        _choice("rule", rule, RULES, " or a callable from BranchStats to coefficients [M]")
    _choice("dependence", dependence, DEPENDENCES)
    _choice("gain", gain, GAINS)
    _choice("reduction", reduction, REDUCTIONS)
    if entropy_floor is not None:
        _number("entropy_floor", entropy_floor, 0.0, 1.0)
    _number("label_smoothing", label_smoothing, 0.0, 1.0)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: got {type(ignore_index).__name__} {ignore_index!r}, expected an int")
    return Options(rule, dependence, entropy_floor, gain, ignore_index, label_smoothing, reduction)


_cached = functools.lru_cache(maxsize=256)(_checked)


def make_options(
    rule: str | Callable,
    dependence: str,
    entropy_floor: float | None,
    gain: str,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> Options:
    """Check every option and return them as one value. Raises ValueError or TypeError naming the argument."""
    make = _checked if torch.compiler.is_compiling() else _cached  # the compiler warns of caches, and needs none
    return make(rule, dependence, entropy_floor, gain, ignore_index, label_smoothing, reduction)


def check_scalar(name: str, value: object, low: float = -math.inf) -> None:
    """gamma and temperature: a finite number or a 0-d tensor that needs no gradient (its value is never read back)."""
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(f"{name}: got a tensor of shape {list(value.shape)}, expected a number or a 0-d tensor")
        if value.requires_grad:
            raise ValueError(f"{name}: got a tensor that requires grad; the loss gives {name} no gradient, pass {name}.detach()")
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__} {value!r}, expected a number or a 0-d tensor")
    elif not (value >= low and -math.inf < value < math.inf):  # for the compiler a number may be a symbol: no math.isfinite
        raise ValueError(f"{name}: got {value}, expected a finite number" + (f" >= {low:g}" if low > -math.inf else ""))
