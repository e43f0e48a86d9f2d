"""The options of the loss and the numbers of a step: their defaults, and which values are legal."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from .spec import DEPENDENCES, GAINS, REDUCTIONS, RULES, TASKS


class Options(NamedTuple):
    """All options of the loss that are plain values and fixed for a run. Hashable, so that it can be cached.

    Attributes:
        rule: from statistics to coefficients: "share", "paper" (two modalities), "constant", "none", "ogm",
            or a callable from BranchStats to coefficients [M].
        dependence: "confidence", the mean true-class probability, or "logit_l1", the mean sum of absolute
            logits.
        entropy_floor: the smallest entropy share before the inversion, in [0, 1]; None: 0.6 / number of
            modalities in the batch.
        gain: "residual" 1 + a_m (Eq. 19), "mean_one" M a_m, or "plain" a_m; always "plain" for rule "ogm".
        ignore_index, label_smoothing, reduction: as in ``torch.nn.functional.cross_entropy``, for each
            branch.
        task: "multiclass", one class per row, or "multilabel", a yes or no for every label (C = 1: binary),
            with the loss of ``torch.nn.functional.binary_cross_entropy_with_logits``.
    """

    rule: str | Callable[[Any], Tensor] = "share"
    dependence: str = "confidence"
    entropy_floor: float | None = None
    gain: str = "residual"
    ignore_index: int = -100
    label_smoothing: float = 0.0
    reduction: str = "mean"
    task: str = "multiclass"

    @property
    def scales(self) -> bool:
        """Whether the rule can give an encoder a gain other than 1, so that a link is needed."""
        return self.rule != "none"

    @property
    def for_kernels(self) -> Options:
        """The same with "constant" in the place of a callable rule, which kernels cannot run."""
        return self if isinstance(self.rule, str) else self._replace(rule="constant")


class LossOptions(TypedDict, total=False):
    """The options that ``arl_loss``, ``ARLLoss`` and the other losses take by keyword; see ``Options``."""

    dependence: str
    entropy_floor: float | None
    gain: str
    ignore_index: int
    label_smoothing: float
    reduction: str
    task: str


def with_options(function: Callable) -> Callable:
    """Show the keywords of LossOptions, with their defaults, in the signature of the function."""
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    options = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=Options._field_defaults[name], annotation=annotation
        )
        for name, annotation in LossOptions.__annotations__.items()
    ]
    function.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    return function


def check_choice(name: str, value: object, allowed: tuple[str, ...], extra: str = "") -> None:
    """Raise ValueError unless the value is one of the allowed strings."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, allowed))}{extra}")


def _check_number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__} {value!r}, expected a number in [{low}, {high}]")
    if not low <= value <= high:
        raise ValueError(f"{name}: got {value}, expected a number in [{low}, {high}]")


def _checked(**given: Any) -> Options:
    unknown = [name for name in given if name not in Options._fields]
    if unknown:
        raise TypeError(f"{unknown[0]}: got an unknown option, expected one of {', '.join(Options._fields)}")
    options = Options(**given)
    if options.rule == "ogm":  # its coefficients are gains
        if given.get("gain", "plain") != "plain":
            raise ValueError(
                f"gain: got {given['gain']!r} with rule='ogm', whose coefficients are the gains: leave it out"
            )
        options = options._replace(gain="plain")
    if not callable(options.rule):
        check_choice("rule", options.rule, RULES, " or a callable from BranchStats to coefficients [M]")
    check_choice("dependence", options.dependence, DEPENDENCES)
    check_choice("gain", options.gain, GAINS)
    check_choice("reduction", options.reduction, REDUCTIONS)
    check_choice("task", options.task, TASKS)
    if options.entropy_floor is not None:
        _check_number("entropy_floor", options.entropy_floor, 0.0, 1.0)
    _check_number("label_smoothing", options.label_smoothing, 0.0, 1.0)
    if isinstance(options.ignore_index, bool) or not isinstance(options.ignore_index, int):
        got = f"{type(options.ignore_index).__name__} {options.ignore_index!r}"
        raise TypeError(f"ignore_index: got {got}, expected an int")
    if options.task == "multilabel" and options.label_smoothing != 0:
        raise ValueError(
            f"label_smoothing: got {options.label_smoothing} with task='multilabel', expected 0; smooth the "
            "targets themselves, they may be any number in [0, 1]"
        )
    return options


_cached = functools.lru_cache(maxsize=256, typed=True)(_checked)


def make_options(**given: Any) -> Options:
    """Options from keywords, checked. Raises ValueError or TypeError naming the argument."""
    if not torch.compiler.is_compiling():  # the compiler warns of caches, and needs none
        try:
            return _cached(**given)
        except TypeError:  # an option of a wrong type, or one that cannot be hashed
            pass
    return _checked(**given)


class Schedule(NamedTuple):
    """The numbers of a step that may change during a run: gamma, temperature, and how far the warm-up is.

    Attributes:
        gamma: weight of the unimodal losses, a number, one number per modality, or a tensor [] or [M] on the
            device.
        temperature: T of the rule, or alpha of "ogm": a number or a 0-d tensor on the device.
        warmup: the length of the warm-up in steps. While it lasts gamma = 1 and all gains are 1.
        step: the number of steps so far, a 0-d integer tensor on the device; None: 0.
    """

    gamma: float | tuple[float, ...] | Tensor
    temperature: float | Tensor
    warmup: int = 0
    step: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """Those of its values that are tensors. They are never read by the host."""
        return [value for value in (self.gamma, self.temperature, self.step) if isinstance(value, Tensor)]

    @property
    def warming(self) -> bool | Tensor:
        """Whether this step belongs to the warm-up; a 0-d bool tensor if the counter is one."""
        return self.warmup > 0 if self.step is None else self.step < self.warmup


def is_plain(options: Options, schedule: Schedule) -> bool:
    """Whether the loss is a plain one, the baseline of every comparison: torch's own, to the last bit."""
    gamma = schedule.gamma
    zero = isinstance(gamma, float) and gamma == 0 and schedule.warmup == 0  # 1 during the warm-up
    return zero and options.rule == "none"


def make_temperature(temperature: Any, rule: Any) -> Any:
    """T of the rule; None: 8, and for "ogm", whose alpha it is, 0.1. OGM's alpha is not negative."""
    if temperature is None:
        return 0.1 if rule == "ogm" else 8.0
    if rule == "ogm":
        check_scalar("temperature", temperature, 0.0)
    return temperature


def make_schedule(gamma: Any, temperature: Any, warming: bool | Tensor, rule: Any) -> Schedule:
    """The schedule of a call that says itself whether it belongs to the warm-up."""
    gamma = tuple(gamma) if isinstance(gamma, list) else gamma
    temperature = make_temperature(temperature, rule)
    if not isinstance(warming, bool) and not (isinstance(warming, Tensor) and warming.dim() == 0):
        got = f"shape {list(warming.shape)}" if isinstance(warming, Tensor) else repr(warming)
        raise TypeError(f"warming: got {got}, expected a bool or a 0-d tensor")
    if isinstance(warming, Tensor):
        return Schedule(gamma, temperature, 1, warming.logical_not().to(torch.int64))
    return Schedule(gamma, temperature, int(warming))


def check_gamma(value: object, modalities: int | None = None) -> None:
    """A number >= 0, one per modality, or a tensor [] or [M]."""
    if isinstance(value, Tensor) and value.dim() == 1:
        lengths = {value.shape[0]}
        _check_tensor("gamma", value, "a number, one per modality, or a tensor [] or [M]")
    elif isinstance(value, Sequence) and not isinstance(value, str):
        lengths = {len(value)}
        for m, one in enumerate(value):
            if isinstance(one, Tensor):
                raise TypeError(
                    f"gamma[{m}]: got a Tensor, expected a number; give all of them as one tensor [M]"
                )
            check_scalar(f"gamma[{m}]", one, 0.0)
    else:
        return check_scalar("gamma", value, 0.0, "a number, one per modality, or a tensor [] or [M]")
    if modalities is not None and lengths != {modalities}:
        raise ValueError(
            f"gamma: got {lengths.pop()} values, expected one, or one for each of the {modalities} modalities"
        )
    return None


def check_scalar(
    name: str, value: object, low: float = -math.inf, expected: str = "a number or a 0-d tensor"
) -> None:
    """A finite number or a 0-d tensor that needs no gradient. The value of a tensor is never read back."""
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(f"{name}: got a tensor of shape {list(value.shape)}, expected {expected}")
        _check_tensor(name, value, expected)
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__} {value!r}, expected {expected}")
    # the compiler's numbers are symbols: no math.isfinite
    elif not (value >= low and -math.inf < value < math.inf):
        bound = f" >= {low:g}" if low > -math.inf else ""
        raise ValueError(f"{name}: got {value}, expected a finite number{bound}")


def _check_tensor(name: str, value: Tensor, expected: str) -> None:
    if value.requires_grad:
        advice = f"the loss gives {name} no gradient, pass {name}.detach()"
        raise ValueError(f"{name}: got a tensor that requires grad; {advice}")
    if value.is_complex():
        raise TypeError(f"{name}: got dtype {value.dtype}, expected {expected}")
