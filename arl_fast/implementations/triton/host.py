"""The Triton implementation (docs/architecture.md, the contract): host side, from tensors to launches.

Serves any GPU that Triton serves, without a compiler at hand, and CPU tensors under TRITON_INTERPRET=1, for
tests. Under torch.compile the three functions are the registered ops ``arl_fast::triton_*``. Eager calls
launch directly.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..._core import rules
from ..._core.branches import Targets
from ..._core.checks import check_class_range
from ..._core.dtypes import compute_dtype, grad_dtype
from ..._core.options import Options, Schedule
from ..._core.stats import packed_length
from .. import ops
from . import plan as launch_plan
from .finish import SUMS, packed_layout
from .forward import forward_kernel
from .labels import labels_kernel
from .launch import (
    INTERPRETED,
    Configuration,
    Launcher,
    kind,
    kinds,
    multiprocessors,
    new_workspace,
    workspaces,
)
from .multiply import modulate_kernel, scale_kernel

MINIMUM = (3, 6)

run_forward = Launcher(forward_kernel)
run_labels = Launcher(labels_kernel)
run_scale = Launcher(scale_kernel)
run_modulate = Launcher(modulate_kernel)


def unavailable(device: str) -> str | None:
    """Why this implementation cannot serve a type of device, or None."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < MINIMUM:
        return f"Triton {triton.__version__} is older than {MINIMUM[0]}.{MINIMUM[1]}"
    if device == "cpu":
        if INTERPRETED:
            return None
        return "Triton serves a CPU only in its interpreter (TRITON_INTERPRET=1), for tests"
    if device != "cuda":
        return f"Triton's kernels are written for cuda devices, got {device}"
    if not torch.cuda.is_available():
        return "no CUDA or ROCm device"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return "needs compute capability 8.0"
    return None


def describe(device: str) -> str:
    """One line for ``python -m arl_fast``."""
    how = "interpreted, for tests" if INTERPRETED else "compiled at first use"
    return f"Triton {triton.__version__}, {how}"


# forward


def _addressable(rows: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], int]:
    """The rows as the kernel addresses them, copied where need be: columns adjacent, the same row stride."""
    first = rows[0].stride()
    if first[1] == 1 and all(x.stride() == first for x in rows):
        return tuple(rows), first[0]
    rows = tuple(x.contiguous() for x in rows)
    return rows, rows[0].shape[1]  # not stride(0): meaningless where there is one row


def gamma_numbers(gamma: float | tuple[float, ...], dtype: torch.dtype) -> tuple[float, ...]:
    """Gamma as the kernel takes numbers, in one tuple.

    Triton passes the numbers in a tuple as float32. For float64 logits, what that cuts off follows in a
    second part.
    """
    # the kernel has other types for integers
    numbers = gamma if isinstance(gamma, tuple) else (float(gamma),)
    if dtype != torch.float64:
        return numbers
    rounded = tuple([ctypes.c_float(g).value for g in numbers])
    return rounded + tuple([g - r for g, r in zip(numbers, rounded, strict=True)])


class Numbers(NamedTuple):
    """The schedule as the kernels take it: each a tensor, or None and the number."""

    gamma: Tensor | None
    gamma_stride: int
    gammas: tuple[float, ...] | None
    temperature: Tensor | None
    temperature_number: float


def _numbers(schedule: Schedule, dtype: torch.dtype) -> Numbers:
    gamma, temperature = schedule.gamma, schedule.temperature
    if isinstance(temperature, Tensor):
        tensor, number = temperature, 0.0
    else:
        tensor, number = None, temperature
    if isinstance(gamma, Tensor):
        return Numbers(gamma, gamma.stride(0) if gamma.dim() else 0, None, tensor, number)
    return Numbers(None, 0, gamma_numbers(gamma, dtype), tensor, number)


@functools.lru_cache(maxsize=256)
def _forward_configuration(
    classes: int, stride: int, branches: int, soft: bool, dtype: torch.dtype, options: Options
) -> tuple[launch_plan.Plan, Configuration]:
    more_sums = launch_plan.needs_more_sums(soft, options)
    plan = launch_plan.plan(classes, dtype.itemsize, more_sums)
    constants = (
        classes,
        stride,
        branches,
        soft,
        options,
        plan,
        launch_plan.COUNTING,
        SUMS,
        packed_layout(branches - 1),
    )
    return plan, Configuration(plan.threads, plan.registers, constants)


def _launch_forward(
    logits: Sequence[Tensor],
    targets: Targets,
    schedule: Schedule,
    options: Options,
    grad: bool,
    fresh_workspace: bool = False,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """All but a callable rule, which needs plain torch: "constant" runs in its place."""
    options = options.for_kernels
    if options.task == "multilabel":
        return _launch_labels(logits, targets, schedule, options, grad, fresh_workspace)
    target, mask, weight, divisor, _ = targets
    x0 = logits[0]
    device, dtype = x0.device, compute_dtype(x0.dtype)
    rows, classes = x0.shape
    branches = len(logits)
    inputs, stride = _addressable(logits)
    soft = target.is_floating_point()
    target = target.contiguous()
    mask = None if mask is None else mask.contiguous()
    weight = None if weight is None else weight.contiguous()
    gamma, gamma_stride, gammas, temperature, temperature_number = _numbers(schedule, dtype)
    plan, configuration = _forward_configuration(classes, stride, branches, soft, x0.dtype, options)
    programs = launch_plan.programs(rows, branches, plan, multiprocessors(device.index))
    loss = torch.empty((), dtype=dtype, device=device)
    packed = torch.empty(packed_length(branches - 1), dtype=dtype, device=device)
    row_loss = grads = None
    if options.reduction == "none":
        row_loss = torch.empty((branches, rows), dtype=dtype, device=device)
    if grad:
        gradient = grad_dtype(x0.dtype)
        grads = tuple([torch.empty((rows, classes), dtype=gradient, device=device) for _ in logits])
    take = new_workspace if fresh_workspace else workspaces.take
    work, counters = take(device, dtype, launch_plan.workspace(branches, programs))
    run_forward(
        device,
        (programs, branches, 1),
        configuration,
        (
            kinds(inputs),
            None if grads is None else kind(grads[0]),
            kind(target),
            kind(mask),
            kind(weight),
            kind(divisor),
            kind(gamma),
            kind(temperature),
            kind(schedule.step),
            kind(row_loss),
            0 if gammas is None else len(gammas),
            rows >> 31,
        ),
        (
            inputs,
            grads,
            target,
            mask,
            weight,
            divisor,
            gamma,
            temperature,
            schedule.step,
            row_loss,
            work,
            counters,
            loss,
            packed,
            gamma_stride,
            gammas,
            temperature_number,
            schedule.warmup,
            rows,
        ),
    )
    if row_loss is not None:  # Eq. 22 by row
        loss = row_loss[0] + rules.weighted_sum(rules.effective_gamma(schedule), row_loss[1:])
    return loss, packed, list(grads or ())


@functools.lru_cache(maxsize=256)
def _labels_configuration(
    labels: int | None, stride: int | None, branches: int, dtype: torch.dtype, options: Options
) -> tuple[launch_plan.PairPlan, Configuration]:
    """``labels``: of a row, where the row or the label of a pair matters; None elsewhere."""
    more = labels is not None or options.reduction == "none"
    plan = launch_plan.pair_plan(dtype.itemsize, grad_dtype(dtype).itemsize, more)
    counting, layout = launch_plan.COUNTING, packed_layout(branches - 1)
    constants = (labels or 1, stride, branches, options, plan, counting, SUMS, layout)
    return plan, Configuration(plan.threads, plan.registers, constants)


def _launch_labels(
    logits: Sequence[Tensor],
    targets: Targets,
    schedule: Schedule,
    options: Options,
    grad: bool,
    fresh_workspace: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """``_launch_forward`` for task "multilabel"."""
    target, mask, weight, divisor, pos_weight = targets
    x0 = logits[0]
    device, dtype = x0.device, compute_dtype(x0.dtype)
    rows, labels = x0.shape
    pairs, branches, none = rows * labels, len(logits), options.reduction == "none"
    inputs, row_stride = _addressable(logits)
    stride = None if row_stride == labels or rows < 2 else row_stride
    target = target.contiguous()
    mask = None if mask is None else mask.contiguous()
    weight = None if weight is None else weight.contiguous()
    pos_weight = None if pos_weight is None else pos_weight.contiguous()
    gamma, gamma_stride, gammas, temperature, temperature_number = _numbers(schedule, dtype)
    by_pair = mask is None and weight is None and pos_weight is None and stride is None
    plan, configuration = _labels_configuration(
        None if by_pair else labels, stride, branches, x0.dtype, options
    )
    side_by_side = 1 if none else branches
    programs = launch_plan.programs(pairs, side_by_side, plan, multiprocessors(device.index))
    loss = torch.empty((rows, labels) if none else (), dtype=dtype, device=device)
    packed = torch.empty(packed_length(branches - 1), dtype=dtype, device=device)
    grads = None
    if grad:
        gradient = grad_dtype(x0.dtype)
        grads = tuple([torch.empty((rows, labels), dtype=gradient, device=device) for _ in logits])
    take = new_workspace if fresh_workspace else workspaces.take
    work, counters = take(device, dtype, launch_plan.workspace(branches, programs))
    run_labels(
        device,
        (programs, side_by_side, 1),
        configuration,
        (
            kinds(inputs),
            None if grads is None else kind(grads[0]),
            kind(target),
            kind(mask),
            kind(weight),
            kind(pos_weight),
            kind(divisor),
            kind(gamma),
            kind(temperature),
            kind(schedule.step),
            0 if gammas is None else len(gammas),
            pairs >> 31,
        ),
        (
            inputs,
            grads,
            target,
            mask,
            weight,
            pos_weight,
            divisor,
            gamma,
            temperature,
            schedule.step,
            work,
            counters,
            loss,
            packed,
            gamma_stride,
            gammas,
            temperature_number,
            schedule.warmup,
            pairs,
        ),
    )
    return loss, packed, list(grads or ())


def forward(
    logits: Sequence[Tensor], targets: Targets, schedule: Schedule, options: Options, grad: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """As reference.forward, and multilabel.forward for its task, in one launch."""
    if torch.compiler.is_compiling():
        loss, packed, grads = ops.forward("triton", logits, targets, schedule, options, grad)
    else:
        target = targets.target
        if target.device.type == "cpu" and not target.is_floating_point():
            check_class_range(target, logits[0].shape[1], options.ignore_index)
        loss, packed, grads = _launch_forward(logits, targets, schedule, options, grad)
    if not isinstance(options.rule, str):
        packed = rules.apply_rule(packed, schedule, options)
    return loss, packed, grads


# backward


@functools.cache
def _scale_configuration(classes: int, branches: int, per_row: bool, in_place: bool) -> Configuration:
    constants = (classes, branches, per_row, in_place, launch_plan.FLAT_BLOCK)
    return Configuration(launch_plan.FLAT_THREADS, None, constants)


def _launch_scale(
    grads: Sequence[Tensor], upstream: Tensor, factor: Tensor | None, dtype: torch.dtype, in_place: bool
) -> list[Tensor]:
    first = grads[0]
    upstream = upstream.contiguous()
    per_row = upstream.dim() > 0  # or, with several labels, per element: rows of one
    results = list(grads) if in_place else [torch.empty_like(g, dtype=dtype) for g in grads]
    size = first.numel()
    if size == 0:
        return results
    run_scale(
        first.device,
        (launch_plan.flat_programs(size, len(grads), multiprocessors(first.device.index)), len(grads), 1),
        _scale_configuration(size // upstream.numel() if per_row else 1, len(grads), per_row, in_place),
        (kinds(grads), kinds(results), kind(upstream), kind(factor), size >> 31),
        (tuple(grads), tuple(results), upstream, factor, size),
    )
    return results


def scale(
    grads: Sequence[Tensor], upstream: Tensor, factor: Tensor | None, dtype: torch.dtype, keep: bool
) -> Sequence[Tensor]:
    """As reference.scale: one launch, in place unless the graph is kept or the dtype changes."""
    if torch.compiler.is_compiling():
        return ops.scale("triton", grads, upstream, factor, dtype)
    return _launch_scale(grads, upstream, factor, dtype, not keep and grads[0].dtype == dtype)


@functools.cache
def _modulate_configuration(modalities: tuple[int, ...]) -> Configuration:
    return Configuration(
        launch_plan.FLAT_THREADS, None, (modalities, len(modalities), launch_plan.FLAT_BLOCK)
    )


def _launch_modulate(grads: Sequence[Tensor], modalities: Sequence[int], link: Tensor) -> list[Tensor]:
    """One launch for each dtype among the gradients."""
    grads = [g.contiguous() for g in grads]
    results = [torch.empty_like(g) for g in grads]
    link = link.contiguous()
    device = link.device
    for dtype in dict.fromkeys([g.dtype for g in grads]):
        group = [
            (g, result, m, size)
            for g, result, m in zip(grads, results, modalities, strict=True)
            if g.dtype == dtype and (size := g.numel())
        ]
        if not group:
            continue
        sources, outputs, entries, sizes = zip(*group, strict=True)
        run_modulate(
            device,
            (launch_plan.flat_programs(max(sizes), len(group), multiprocessors(device.index)), len(group), 1),
            _modulate_configuration(entries),
            (kinds(sources), kinds(outputs), kind(link), *[size >> 30 for size in sizes]),
            (sources, outputs, tuple([2 * size + 1 for size in sizes]), link),
        )
    return results


def modulate_backward(grads: Sequence[Tensor | None], link: Tensor) -> Sequence[Tensor | None]:
    """As reference.modulate_backward, in one launch for all features of one dtype."""
    if torch.compiler.is_compiling():
        return ops.modulate_backward("triton", grads, link)
    return ops.for_present(grads, lambda present, modalities: _launch_modulate(present, modalities, link))


# torch.compile, and warming up


def _forward_op(
    logits: Sequence[Tensor], targets: Targets, schedule: Schedule, options: Options, grad: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """With memory of its own in every call.

    torch.compile runs ops on memory that belongs to a CUDA graph, before it captures and within. Nothing of
    that may outlive the call.
    """
    return _launch_forward(logits, targets, schedule, options, grad, fresh_workspace=True)


def _scale_op(
    grads: Sequence[Tensor], upstream: Tensor, factor: Tensor | None, dtype: torch.dtype
) -> list[Tensor]:
    return _launch_scale(grads, upstream, factor, dtype, in_place=False)


ops.define("triton")
ops.implement("triton", _forward_op, _scale_op, _launch_modulate)


def warm_up(
    logits: Sequence[Tensor],
    target: Tensor,
    options: Options,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    schedule: Schedule = Schedule(1.0, 8.0),  # noqa: B008, a tuple
    pos_weight: Tensor | None = None,
    features: Sequence[Tensor] = (),
) -> None:
    """Compile and allocate everything that a training step on tensors like these needs, for example before a
    capture.

    Call it on the device's stream, outside the capture. The batch may have any size: kernels do not depend on
    it.

    Args:
        logits, target, mask, weight, schedule, pos_weight: as in ``forward``; nothing is written to them.
        options: of the loss.
        features: what ``modulate`` is given, if it is used.
    """
    targets = Targets(target, mask, weight, pos_weight=pos_weight)
    forward(logits, targets, schedule, options, False)
    loss, _, grads = forward(logits, targets, schedule, options, True)
    upstream = torch.ones_like(loss)
    scale(grads, upstream, None, logits[0].dtype, True)
    scale(grads, upstream, None, logits[0].dtype, False)
    if features:
        double = any(z.dtype == torch.float64 for z in features)
        link = torch.zeros(
            len(features), dtype=torch.float64 if double else torch.float32, device=features[0].device
        )
        modulate_backward(features, link)
