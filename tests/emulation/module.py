"""The CUDA launchers, emulated, as an implementation of the contract for CPU tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_bool, c_double, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from arl_fast._core import dtypes, rules
from arl_fast._core.checks import check_class_range
from arl_fast._core.options import Options, Schedule
from arl_fast._core.spec import DEPENDENCES, GAINS, REDUCTIONS, RULES, TASKS
from arl_fast._core.stats import packed_length

from . import build

MAX_BRANCHES = 16
DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
TARGETS = {torch.int64: 0, torch.int32: 1}

allocate = torch.empty  # tests say where buffers come from


class COptions(Structure):
    """The fields of Options in their order: names as their position, None as -1."""

    _fields_ = [
        ("rule", c_int),
        ("dependence", c_int),
        ("entropy_floor", c_double),
        ("gain", c_int),
        ("ignore_index", c_int64),
        ("label_smoothing", c_double),
        ("reduction", c_int),
        ("task", c_int),
    ]


CHOICES = {
    "rule": RULES,
    "dependence": DEPENDENCES,
    "gain": GAINS,
    "reduction": REDUCTIONS,
    "task": TASKS,
}


class ScheduleArgs(Structure):
    _fields_ = [
        ("gamma", c_void_p),
        ("gamma_stride", c_int64),
        ("temperature", c_void_p),
        ("step", c_void_p),
        ("gammas", c_double * (MAX_BRANCHES - 1)),
        ("temperature_number", c_double),
        ("warmup", c_int64),
    ]


class ForwardArgs(Structure):
    _fields_ = [
        ("dtype", c_int),
        ("branches", c_int),
        ("rows", c_int64),
        ("classes", c_int64),
        ("logits", c_void_p * MAX_BRANCHES),
        ("row_stride", c_int64 * MAX_BRANCHES),
        ("grads", c_void_p * MAX_BRANCHES),
        ("target", c_void_p),
        ("target_kind", c_int),
        ("target_stride", c_int64),
        ("mask", c_void_p),
        ("mask_row_stride", c_int64),
        ("mask_column_stride", c_int64),
        ("weight", c_void_p),
        ("pos_weight", c_void_p),
        ("divisor", c_void_p),
        ("schedule", ScheduleArgs),
        ("options", COptions),
        ("loss", c_void_p),
        ("packed", c_void_p),
        ("workspace", c_void_p),
    ]


class ScaleArgs(Structure):
    _fields_ = [
        ("dtype", c_int),
        ("branches", c_int),
        ("rows", c_int64),
        ("classes", c_int64),
        ("grads", c_void_p * MAX_BRANCHES),
        ("out", c_void_p * MAX_BRANCHES),
        ("upstream", c_void_p),
        ("per_row", c_bool),
        ("upstream_stride", c_int64),
        ("factor", c_void_p),
    ]


class ModulateArgs(Structure):
    _fields_ = [
        ("count", c_int),
        ("dtype", c_int * MAX_BRANCHES),
        ("grads", c_void_p * MAX_BRANCHES),
        ("out", c_void_p * MAX_BRANCHES),
        ("size", c_int64 * MAX_BRANCHES),
        ("link_index", c_int * MAX_BRANCHES),
        ("link", c_void_p),
        ("link_dtype", c_int),
    ]


class Shape(Structure):
    _fields_ = [
        ("dtype", c_int),
        ("branches", c_int),
        ("rows", c_int64),
        ("classes", c_int64),
        ("dense", c_bool),
        ("per_row_loss", c_bool),
        ("counts", c_bool),
    ]


class Device(Structure):
    _fields_ = [("multiprocessors", c_int), ("shared_memory", c_int), ("clusters", c_bool)]


class Plan(Structure):
    _fields_ = [
        ("family", c_int),
        ("threads", c_int),
        ("threads_per_row", c_int),
        ("rows_per_block", c_int),
        ("grid_x", c_int),
        ("grid_y", c_int),
        ("shared_vectors", c_int),
        ("cluster", c_int),
        ("count_blocks", c_int),
        ("workspace_bytes", c_int64),
    ]


def library() -> ctypes.CDLL:
    lib = build.library()
    if not hasattr(lib, "checked"):
        for which, mirror in enumerate((ForwardArgs, ScaleArgs, ModulateArgs, Shape, Device, Plan)):
            assert lib.size_of(which) == ctypes.sizeof(mirror), mirror.__name__
        for function in (lib.emulated_workspace_bytes, lib.launches, lib.memsets, lib.ticket_of):
            function.restype = c_int64
        lib.ticket_of.argtypes = [c_int64]
        lib.needs_opt_in_of.restype = c_bool
        lib.emulated_workspace_bytes.argtypes = [POINTER(ForwardArgs)]
        lib.set_seed.argtypes = [ctypes.c_uint64]
        lib.checked = True
    return lib


def plan(shape: Shape, device: Device) -> Plan:
    result = Plan()
    library().plan_of(byref(shape), byref(device), byref(result))
    return result


def unavailable(device: str) -> str | None:
    return "emulates a GPU on a CPU" if device != "cpu" else build.unavailable()


def describe(device: str) -> str:
    return "CUDA kernels, emulated"


def _options(options: Options) -> COptions:
    values = options.for_kernels._asdict()
    for name, choices in CHOICES.items():
        values[name] = choices.index(values[name])
    return COptions(**{name: -1 if value is None else value for name, value in values.items()})


def _pointers(tensors: Sequence[Tensor]):
    return (c_void_p * MAX_BRANCHES)(*(x.data_ptr() for x in tensors))


def _schedule(schedule: Schedule, modalities: int) -> ScheduleArgs:
    gamma, temperature, warmup, step = schedule
    args = ScheduleArgs(warmup=warmup)
    if isinstance(gamma, Tensor):
        args.gamma, args.gamma_stride = gamma.data_ptr(), gamma.stride(0) if gamma.dim() else 0
    else:
        gammas = gamma if isinstance(gamma, tuple) else (gamma,) * modalities
        args.gammas = (c_double * (MAX_BRANCHES - 1))(*gammas)
    if isinstance(temperature, Tensor):
        args.temperature = temperature.data_ptr()
    else:
        args.temperature_number = temperature
    args.step = None if step is None else step.data_ptr()
    return args


def forward(logits, targets, schedule, options, grad, check=True):
    target, mask, weight, divisor, pos_weight = targets
    first = logits[0]
    rows, classes = first.shape
    dtype = dtypes.compute_dtype(first.dtype)
    logits = [x if x.stride(1) == 1 or classes == 1 else x.contiguous() for x in logits]
    args = ForwardArgs(
        dtype=DTYPES[first.dtype], branches=len(logits), rows=rows, classes=classes, options=_options(options)
    )
    args.logits = _pointers(logits)
    args.row_stride = (c_int64 * MAX_BRANCHES)(*(x.stride(0) for x in logits))
    grads = [allocate((rows, classes), dtype=dtypes.grad_dtype(first.dtype)) for _ in logits] if grad else []
    args.grads = _pointers(grads)
    if target.is_floating_point():
        target = target.to(dtype)
        target = target if target.stride(1) == 1 or classes == 1 else target.contiguous()
        args.target_kind = 2
    else:
        if check:
            check_class_range(target, classes, options.ignore_index)
        args.target_kind = TARGETS[target.dtype]
    args.target, args.target_stride = target.data_ptr(), target.stride(0)
    if mask is not None:
        args.mask, args.mask_row_stride, args.mask_column_stride = (
            mask.data_ptr(),
            mask.stride(0),
            mask.stride(1),
        )
    if weight is not None:
        weight = weight.contiguous()
        args.weight = weight.data_ptr()
    if pos_weight is not None:
        pos_weight = pos_weight.contiguous()
        args.pos_weight = pos_weight.data_ptr()
    args.divisor = None if divisor is None else divisor.data_ptr()
    args.schedule = _schedule(schedule, len(logits) - 1)
    each = (rows, classes) if options.task == "multilabel" else (rows,)
    loss = allocate(each if options.reduction == "none" else (), dtype=dtype)
    packed = allocate((packed_length(len(logits) - 1),), dtype=dtype)
    args.loss, args.packed = loss.data_ptr(), packed.data_ptr()
    lib = library()
    workspace_bytes = lib.emulated_workspace_bytes(byref(args))
    assert workspace_bytes >= 0
    workspace = allocate((workspace_bytes,), dtype=torch.uint8)
    args.workspace = workspace.data_ptr()
    assert lib.emulated_forward(byref(args)) == 0
    if not isinstance(options.rule, str):
        packed = rules.apply_rule(packed, schedule, options)
    return loss, packed, grads


def scale(grads, upstream, factor, dtype, keep):
    args = ScaleArgs(
        dtype=DTYPES[dtype], branches=len(grads), rows=grads[0].shape[0], classes=grads[0].shape[1]
    )
    out = [allocate(g.shape, dtype=dtype) for g in grads] if keep or dtype != grads[0].dtype else grads
    args.grads, args.out = _pointers(grads), _pointers(out)
    if upstream.dim() == 2:  # of each pair: rows of one
        upstream, args.rows, args.classes = upstream.reshape(-1), upstream.numel(), 1
    args.upstream, args.per_row = upstream.data_ptr(), upstream.dim() == 1
    args.upstream_stride = upstream.stride(0) if upstream.dim() else 0
    args.factor = None if factor is None else factor.data_ptr()
    assert library().emulated_scale(byref(args)) == 0
    return out


def modulate_backward(grads, link):
    given = [(m, g.contiguous()) for m, g in enumerate(grads) if g is not None]
    out = [allocate(g.shape, dtype=g.dtype) for _, g in given]
    args = ModulateArgs(count=len(given), link=link.data_ptr(), link_dtype=DTYPES[link.dtype])
    args.dtype = (c_int * MAX_BRANCHES)(*(DTYPES[g.dtype] for _, g in given))
    args.grads, args.out = _pointers([g for _, g in given]), _pointers(out)
    args.size = (c_int64 * MAX_BRANCHES)(*(g.numel() for _, g in given))
    args.link_index = (c_int * MAX_BRANCHES)(*(m for m, _ in given))
    assert library().emulated_modulate(byref(args)) == 0
    result: list[Tensor | None] = [None] * len(grads)
    for (m, _), g in zip(given, out, strict=True):
        result[m] = g
    return result
