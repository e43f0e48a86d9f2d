"""The contract's three functions as registered ops, opaque to torch.compile: one set for each compiled
implementation.

``define`` registers ``arl_fast::<prefix>_forward``, ``_scale`` and ``_modulate_backward`` with their fakes,
which state shapes, dtypes and strides; ``implement`` says what runs them. The ops are functional: no argument
is written, no result shares memory with another tensor, and all results are contiguous.
"""

from __future__ import annotations

import ast
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._core._torch import constant_for_compiler
from .._core.branches import Targets
from .._core.dtypes import compute_dtype, grad_dtype
from .._core.options import Options, Schedule
from .._core.stats import packed_length

library = torch.library.Library("arl_fast", "FRAGMENT")

SCHEMAS = {
    "forward": "(Tensor[] logits, Tensor target, Tensor? mask, Tensor? weight, Tensor? divisor, "
    "Tensor? pos_weight, Tensor?[] schedule, float[] numbers, int warmup, str options, float[] floats, "
    "bool grad) "
    "-> (Tensor, Tensor, Tensor[])",
    "scale": "(Tensor[] grads, Tensor upstream, Tensor? factor, ScalarType dtype) -> Tensor[]",
    "modulate_backward": "(Tensor[] grads, int[] modalities, Tensor link) -> Tensor[]",
}


@constant_for_compiler
def _text(*values: Any) -> str:
    return repr(values)


def encode_options(options: Options) -> tuple[str, list[float]]:
    """The options as an op takes them: one string, and the float values; a callable rule becomes "constant".

    The compiler may hold a symbol for a float, which no string can contain. So the string has 0.0 for each.
    """
    values: list[Any] = []
    floats: list[float] = []
    for value in options.for_kernels:
        if isinstance(value, float):
            floats.append(value)
            value = 0.0
        elif isinstance(value, int):
            value = operator.index(value)  # makes a constant of the compiler's symbol
        values.append(value)
    return _text(*values), floats


def decode_options(text: str, floats: Sequence[float]) -> Options:
    return _decoded(text, tuple(floats))


@functools.lru_cache(maxsize=256)
def _decoded(text: str, floats: tuple[float, ...]) -> Options:
    given = iter(floats)
    values: list[Any] = [next(given) if isinstance(v, float) else v for v in ast.literal_eval(text)]
    return Options(*values)


def encode_schedule(schedule: Schedule) -> tuple[list[Tensor | None], list[float], int]:
    """The schedule as an op takes it.

    Returns:
        gamma, temperature and the step counter, None where they are numbers (or no counter is given);
        the numbers: those of gamma (none if it is a tensor), then the temperature (0 if it is a tensor);
        the length of the warm-up.
    """
    gamma, temperature, warmup, step = schedule
    tensors = [value if isinstance(value, Tensor) else None for value in (gamma, temperature, step)]
    if isinstance(gamma, Tensor):
        numbers = []
    else:
        numbers = list(gamma) if isinstance(gamma, tuple) else [gamma]
    numbers.append(0.0 if isinstance(temperature, Tensor) else temperature)
    return tensors, numbers, warmup


def decode_schedule(tensors: Sequence[Tensor | None], numbers: Sequence[float], warmup: int) -> Schedule:
    gamma, temperature, step = tensors
    *gammas, number = numbers
    return Schedule(
        gamma if gamma is not None else gammas[0] if len(gammas) == 1 else tuple(gammas),
        number if temperature is None else temperature,
        warmup,
        step,
    )


def define(prefix: str) -> None:
    """Register the three ops of an implementation, without code that runs them."""
    fakes: dict[str, Callable[..., Any]] = {
        "forward": _fake_forward,
        "scale": _fake_scale,
        "modulate_backward": _fake_modulate_backward,
    }
    for function, schema in SCHEMAS.items():
        library.define(f"{prefix}_{function}{schema}")
        torch.library.register_fake(f"arl_fast::{prefix}_{function}", fakes[function], lib=library)


def implement(
    prefix: str,
    forward: Callable[..., tuple[Tensor, Tensor, list[Tensor]]],
    scale: Callable[..., list[Tensor]],
    modulate_backward: Callable[..., list[Tensor]],
    key: str = "CompositeExplicitAutograd",
) -> None:
    """Let an implementation's functions run its ops.

    Args:
        forward: takes what the contract's ``forward`` takes, (logits, targets, schedule, options, grad).
        scale, modulate_backward: take what the ops take.
        key: the dispatch key, "CPU" or "CUDA" for one type of device; by default any device.
    """

    def run_forward(
        logits: list[Tensor],
        target: Tensor,
        mask: Tensor | None,
        weight: Tensor | None,
        divisor: Tensor | None,
        pos_weight: Tensor | None,
        schedule: list[Tensor | None],
        numbers: list[float],
        warmup: int,
        options: str,
        floats: list[float],
        grad: bool,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        targets = Targets(target, mask, weight, divisor, pos_weight)
        return forward(
            logits,
            targets,
            decode_schedule(schedule, numbers, warmup),
            decode_options(options, floats),
            grad,
        )

    library.impl(f"{prefix}_forward", run_forward, key)
    library.impl(f"{prefix}_scale", scale, key)
    library.impl(f"{prefix}_modulate_backward", modulate_backward, key)


def forward(
    prefix: str, logits: Sequence[Tensor], targets: Targets, schedule: Schedule, options: Options, grad: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Call the op: the contract's ``forward`` without a callable rule."""
    op = getattr(torch.ops.arl_fast, f"{prefix}_forward")
    return op(list(logits), *targets, *encode_schedule(schedule), *encode_options(options), grad)


def scale(
    prefix: str, grads: Sequence[Tensor], upstream: Tensor, factor: Tensor | None, dtype: torch.dtype
) -> list[Tensor]:
    """Call the op: the contract's ``scale``, never in place."""
    return getattr(torch.ops.arl_fast, f"{prefix}_scale")(list(grads), upstream, factor, dtype)


def modulate_backward(prefix: str, grads: Sequence[Tensor | None], link: Tensor) -> list[Tensor | None]:
    """Call the op: the contract's ``modulate_backward``."""
    op = getattr(torch.ops.arl_fast, f"{prefix}_modulate_backward")
    return for_present(grads, lambda present, modalities: op(present, modalities, link))


def for_present(
    grads: Sequence[Tensor | None], function: Callable[[list[Tensor], list[int]], Sequence[Tensor]]
) -> list[Tensor | None]:
    """Apply a function of (gradients, their modalities) to the gradients that are there; None stays None."""
    modalities = [m for m, g in enumerate(grads) if g is not None]
    results: list[Tensor | None] = [None] * len(grads)
    for m, result in zip(modalities, function([g for g in grads if g is not None], modalities), strict=True):
        results[m] = result
    return results


def _fake_forward(
    logits: list[Tensor], target: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    *_, options, floats, grad = arguments
    fused = logits[0]
    dtype = compute_dtype(fused.dtype)
    decoded = decode_options(options, [0.0] * len(floats))
    shape = () if decoded.reduction != "none" else fused.shape[: 2 if decoded.task == "multilabel" else 1]
    loss = fused.new_empty(shape, dtype=dtype)
    packed = fused.new_empty(packed_length(len(logits) - 1), dtype=dtype)
    grads = [x.new_empty(x.shape, dtype=grad_dtype(x.dtype)) for x in logits] if grad else []
    return loss, packed, grads


def _fake_scale(
    grads: list[Tensor], upstream: Tensor, factor: Tensor | None, dtype: torch.dtype
) -> list[Tensor]:
    return [g.new_empty(g.shape, dtype=dtype) for g in grads]


def _fake_modulate_backward(grads: list[Tensor], modalities: list[int], link: Tensor) -> list[Tensor]:
    return [g.new_empty(g.shape) for g in grads]
