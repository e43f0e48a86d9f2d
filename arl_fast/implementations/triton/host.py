"""The Triton implementation (docs/architecture.md, the contract): host side, from tensors to launches.

Serves any GPU that Triton serves, without a compiler at hand, and CPU tensors under TRITON_INTERPRET=1, for tests. Under
torch.compile the three functions are the registered ops ``arl_fast::triton_*``; in eager they launch directly.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ..._core import rules
from ..._core.branches import Targets
from ..._core.checks import check_class_range
from ..._core.dtypes import compute_dtype, grad_dtype
from ..._core.options import Options, Schedule
from ..._core.stats import packed_length
from .. import ops, reference
from . import plan as triton_rule
from .forward import forward_kernel
from .launch import INTERPRETED, Launcher, kind, kinds, multiprocessors, workspaces
from .multiply import modulate_kernel, scale_kernel

MINIMUM = (3, 6)

run_forward, run_scale, run_modulate = (
    Launcher(forward_kernel),
    Launcher(scale_kernel),
    Launcher(modulate_kernel),
)


def unavailable(device: str) -> str | None:
    """Why this implementation cannot serve a type of device, or None."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < MINIMUM:
        return f"Triton {triton.__version__} is older than {MINIMUM[0]}.{MINIMUM[1]}"
    if device == "cpu":
        return (
            None
            if INTERPRETED
            else "Triton serves a CPU only in its interpreter (TRITON_INTERPRET=1), for tests"
        )
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
    """The rows as the kernel addresses them: columns adjacent, one row stride for all branches. Others are copied."""
    first = rows[0].stride()
    if first[1] == 1 and all(x.stride() == first for x in rows):
        return tuple(rows), first[0]
    rows = tuple(x.contiguous() for x in rows)
    return rows, rows[0].shape[1]  # not stride(0): meaningless where there is one row


def _schedule(schedule: Schedule, like: Tensor) -> tuple[Tensor | None, float, float, int]:
    """Interim: one tensor [3], or three numbers."""
    if not schedule.tensors:
        return None, float(schedule.gamma), float(schedule.temperature), int(schedule.warming)
    values = (schedule.gamma, schedule.temperature, schedule.warming)
    dtype = compute_dtype(like.dtype)
    return torch.stack([torch.as_tensor(v, dtype=dtype).to(like.device) for v in values]), 1.0, 0.0, 0


@functools.lru_cache(maxsize=256)
def _constants(
    classes: int, stride: int, branches: int, soft: bool, dtype: torch.dtype, options: Options
) -> tuple[plan.Plan, tuple[Any, ...]]:
    """The plan and the forward kernel's constants."""
    heavy = triton_rule.heavy(soft, options.label_smoothing, options.dependence)
    plan = triton_rule.plan(classes, dtype.itemsize, heavy)
    return plan, (
        classes,
        stride,
        branches,
        soft,
        options.ignore_index,
        options.label_smoothing,
        options.reduction,
        options.dependence,
        options.rule,
        options.gain,
        options.entropy_floor,
        plan.online,
        plan.steps,
        plan.owners,
        plan.lanes,
        triton_rule.COUNT_ALONE,
        triton_rule.COUNT_BLOCK,
        triton_rule.COUNT_CHUNKS,
    )


def _launch_forward(
    logits: Sequence[Tensor],
    targets: Targets,
    numbers: tuple[Tensor | None, float, float, int],
    options: Options,
    grad: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """All but a callable rule, which needs plain torch: "constant" runs in its place."""
    options = options.for_kernels
    target, mask, weight, norm = targets
    x0 = logits[0]
    device, dtype = x0.device, compute_dtype(x0.dtype)
    rows, classes = x0.shape
    branches = len(logits)
    inputs, stride = _addressable(logits)
    soft = target.is_floating_point()
    target = target.contiguous()
    mask = None if mask is None else mask.contiguous()
    weight = None if weight is None else weight.contiguous()
    on_device, gamma, temperature, warming = numbers

    plan, constants = _constants(classes, stride, branches, soft, x0.dtype, options)
    programs = triton_rule.programs(rows, branches, plan, multiprocessors(device.index))
    loss = torch.empty((), dtype=dtype, device=device)
    packed = torch.empty(packed_length(branches - 1), dtype=dtype, device=device)
    per_row = (
        torch.empty((branches, rows), dtype=dtype, device=device) if options.reduction == "none" else None
    )
    grads = (
        tuple([torch.empty((rows, classes), dtype=grad_dtype(x0.dtype), device=device) for _ in logits])
        if grad
        else None
    )
    state, work = workspaces.take(device, dtype, triton_rule.workspace(branches, programs))
    run_forward(
        device,
        (programs, branches, 1),
        plan.threads,
        plan.registers,
        (
            kinds(inputs),
            grad,
            kind(target),
            kind(mask),
            kind(weight),
            kind(norm),
            kind(on_device),
            rows >> 31,
        ),
        (
            inputs,
            grads,
            target,
            mask,
            weight,
            norm,
            on_device,
            per_row,
            work,
            state,
            loss,
            packed,
            rows,
            gamma,
            temperature,
            warming,
        ),
        constants,
    )
    if per_row is not None:  # Eq. 22 by row
        if on_device is not None:
            gamma = torch.where(on_device[2] != 0, 1.0, on_device[0])
        loss = per_row[0] + (1.0 if warming else gamma) * per_row[1:].sum(0)
    return loss, packed, list(grads or ())


def forward(
    logits: Sequence[Tensor], targets: Targets, schedule: Schedule, options: Options, grad: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """As reference.forward, in one launch."""
    if isinstance(schedule.gamma, tuple) or (isinstance(schedule.gamma, Tensor) and schedule.gamma.dim()):
        return reference.forward(logits, targets, schedule, options, grad)
    numbers = _schedule(schedule, logits[0])
    if torch.compiler.is_compiling():
        loss, packed, grads = torch.ops.arl_fast.triton_forward(
            list(logits), *targets, *numbers[:3], bool(numbers[3]), *options.for_kernels, grad
        )
    else:
        target = targets.target
        if target.device.type == "cpu" and not target.is_floating_point():
            check_class_range(target, logits[0].shape[1], options.ignore_index)
        loss, packed, grads = _launch_forward(logits, targets, numbers, options, grad)
    if not isinstance(options.rule, str):
        packed = rules.apply_rule(packed, schedule, options)
    return loss, packed, grads


# backward


def _launch_scale(
    grads: Sequence[Tensor], upstream: Tensor, factor: Tensor | None, dtype: torch.dtype, in_place: bool
) -> list[Tensor]:
    first = grads[0]
    upstream = upstream.contiguous()
    results = list(grads) if in_place else [torch.empty_like(g, dtype=dtype) for g in grads]
    size = first.numel()
    if size == 0:
        return results
    run_scale(
        first.device,
        (triton_rule.flat_programs(size, len(grads), multiprocessors(first.device.index)), len(grads), 1),
        triton_rule.FLAT_THREADS,
        None,
        (kinds(grads), kinds(results), kind(upstream), kind(factor), size >> 31),
        (tuple(grads), tuple(results), upstream, factor, size),
        (first.shape[1], len(grads), upstream.dim() > 0, in_place, triton_rule.FLAT_BLOCK),
    )
    return results


def scale(
    grads: Sequence[Tensor], upstream: Tensor, factor: Tensor | None, dtype: torch.dtype, keep: bool
) -> Sequence[Tensor]:
    """As reference.scale: one launch, in place unless the graph is kept or the dtype changes."""
    if torch.compiler.is_compiling():
        return torch.ops.arl_fast.triton_scale(list(grads), upstream, factor, dtype)
    return _launch_scale(grads, upstream, factor, dtype, not keep and grads[0].dtype == dtype)


def _launch_modulate(grads: Sequence[Tensor], modalities: Sequence[int], link: Tensor) -> list[Tensor]:
    """One launch per dtype among the gradients; with one dtype, one."""
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
            (triton_rule.flat_programs(max(sizes), len(group), multiprocessors(device.index)), len(group), 1),
            triton_rule.FLAT_THREADS,
            None,
            (kinds(sources), kinds(outputs), kind(link), *[size >> 30 for size in sizes]),
            (sources, outputs, tuple([2 * size + 1 for size in sizes]), link),
            (entries, len(group), triton_rule.FLAT_BLOCK),
        )
    return results


def modulate_backward(grads: Sequence[Tensor | None], link: Tensor) -> Sequence[Tensor | None]:
    """As reference.modulate_backward, in one launch for all features of one dtype."""
    some = [(m, g) for m, g in enumerate(grads) if g is not None]
    modalities, present = [m for m, _ in some], [g for _, g in some]
    if torch.compiler.is_compiling():
        scaled = torch.ops.arl_fast.triton_modulate(present, modalities, link)
    else:
        scaled = _launch_modulate(present, modalities, link)
    results: list[Tensor | None] = [None] * len(grads)
    for m, g in zip(modalities, scaled, strict=True):
        results[m] = g
    return results


# torch.compile, and warming up


def _forward_op(
    logits: Sequence[Tensor],
    target: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    norm: Tensor | None,
    schedule: Tensor | None,
    gamma: float,
    temperature: float,
    warming: bool,
    *rest: Any,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    *options, grad = rest
    targets = Targets(target, mask, weight, norm)
    return _launch_forward(logits, targets, (schedule, gamma, temperature, warming), Options(*options), grad)


def _scale_op(
    grads: Sequence[Tensor], upstream: Tensor, factor: Tensor | None, dtype: torch.dtype
) -> list[Tensor]:
    return _launch_scale(grads, upstream, factor, dtype, in_place=False)


ops.register("triton_forward", _forward_op, ops.fake_forward)
ops.register("triton_scale", _scale_op, ops.fake_scale)
ops.register("triton_modulate", _launch_modulate, ops.fake_modulate)


def warm_up(
    logits: Sequence[Tensor],
    target: Tensor,
    options: Options,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    schedule: Schedule = Schedule(1.0, 8.0),  # noqa: B008, a tuple
    features: Sequence[Tensor] = (),
) -> None:
    """Compile and allocate everything that a training step on tensors like these needs, for example before a capture.

    Call it on the device's stream, outside the capture. The batch may have any size: kernels do not depend on it.

    Args:
        logits, target, mask, weight, schedule: as in ``forward``; nothing is written to them.
        options: of the loss.
        features: what ``modulate`` is given, if it is used.
    """
    targets = Targets(target, mask, weight)
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
