"""What the Triton kernels compile to, for GPUs that are not here: registers, spills, widths, and a predicted
time.

    python benchmarks/static_report.py [--targets sm_80 sm_90 sm_100 gfx942] [--classes 6 1000 32000 |
    --every]

Compiles plans that arl_fast/implementations/triton/plan.py can pick, ahead of time, and reads the machine
code's properties from the compiler. tests/test_triton_static.py keeps the budgets, for every plan. Nothing
here is a measurement.

The model behind the predicted time of one forward launch with gradients (M = 2), `predict`:
- the kernel runs as long as the slowest of: DRAM traffic at 90 % of the data sheet's bandwidth, counted at
  the floor (each logit read once, each gradient written once); L2 traffic, which for streamed rows includes
  the second read, taken to be all hits; instructions at 4 per cycle and multiprocessor; exponentials at 16
  per cycle and multiprocessor;
- float64 is left out: it is there for gradcheck;
- PTX instructions are counted in the innermost loop around the exponentials, as if each became one machine
  instruction, which overstates them (moves disappear) by more than the shuffles and barriers understate;
- occupancy suffices to overlap all of these, and a fixed 4 us are added for the launch, the first loads and
  the last program's work. That is the term that decides for small batches, and it is a guess.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import multiprocessing
import os
import re
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from triton import __version__ as version
from triton import compile as compile_ahead
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from arl_fast._core.options import Options
from arl_fast.implementations.triton import plan as launch_plan
from arl_fast.implementations.triton.finish import SUMS, packed_layout
from arl_fast.implementations.triton.forward import forward_kernel
from arl_fast.implementations.triton.labels import labels_kernel
from arl_fast.implementations.triton.multiply import modulate_kernel, scale_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}


@dataclass(frozen=True)
class Device:
    """Data sheet values: bytes per second, multiprocessors, cycles per second."""

    dram: float
    l2: float
    multiprocessors: int
    clock: float


DEVICES = {"H200": Device(4.8e12, 5.5e12, 132, 1.75e9), "A100": Device(2.04e12, 4.0e12, 108, 1.41e9)}
DRAM_SHARE, FIXED = 0.9, 4e-6


@dataclass(frozen=True)
class Case:
    """One specialisation of the forward kernel."""

    classes: int
    dtype: str = "fp32"
    modalities: int = 2
    grad: bool = True
    soft: bool = False
    mask: bool = False
    smoothing: float = 0.0
    dependence: str = "confidence"
    rule: str = "share"
    reduction: str = "mean"

    @property
    def plan(self) -> launch_plan.Plan:
        more_sums = launch_plan.needs_more_sums(self.soft, self.options)
        return launch_plan.plan(self.classes, ITEMSIZE[self.dtype], more_sums)

    @property
    def options(self) -> Options:
        return Options(
            rule=self.rule,
            dependence=self.dependence,
            label_smoothing=self.smoothing,
            reduction=self.reduction,
        )

    @property
    def label(self) -> str:
        names = [name for name in ("soft", "mask", "smoothing") if getattr(self, name)]
        names += [] if self.dependence == "confidence" else ["l1"]
        return "+".join(names) or ("loss" if self.grad else "evaluation")


@dataclass(frozen=True)
class Report:
    """Properties of one compiled kernel; widths are bytes per thread and tile, in 16-byte accesses alone."""

    registers: int
    spills: int
    shared: int
    loads16: int
    stores16: int
    exponentials: int
    instructions: int


def constant(value: Any) -> tuple[str, Any]:
    return ("constexpr", value)


def compile_kernel(
    kernel: Any, arguments: dict[str, Any], target: GPUTarget, threads: int, registers: int | None
) -> tuple[Any, str]:
    """The compiled kernel and what ptxas said of it, with the options that Triton gives it.

    ``arguments``: a type such as "*fp32" (pointers are 16-byte aligned), a tuple of types, or
    ``constant(value)``.
    """
    signature: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    aligned = [["tt.divisibility", 16]]
    for i, name in enumerate(kernel.arg_names):
        kind = arguments[name]
        if kind[0] == "constexpr":
            signature[name], constants[name] = kind
            continue
        signature[name] = kind
        for path, one in (
            [((i,), kind)] if isinstance(kind, str) else [((i, j), one) for j, one in enumerate(kind)]
        ):
            if one.startswith("*"):
                attributes[path] = aligned
    options = {"num_warps": threads // target.warp_size}
    if registers is not None and target.backend == "cuda":
        options["maxnreg"] = registers
    source, said = ASTSource(kernel, signature, constants, attributes), io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(said):
        knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True
        return compile_ahead(source, target=target, options=options), said.getvalue()


def forward_arguments(case: Case) -> dict[str, Any]:
    branches, plan = case.modalities + 1, case.plan
    compute = "fp64" if case.dtype == "fp64" else "fp32"
    none = constant(None)
    return dict(
        logits=(f"*{case.dtype}",) * branches,
        grads=(("*fp32" if case.dtype == "fp16" else f"*{case.dtype}"),) * branches if case.grad else none,
        target=f"*{compute}" if case.soft else "*i64",
        mask="*i1" if case.mask else none,
        weight=none,
        divisor=none,
        gamma=none,
        temperature=none,
        step=none,
        row_loss=f"*{compute}" if case.reduction == "none" else none,
        work=f"*{compute}",
        counters="*i32",
        loss=f"*{compute}",
        packed=f"*{compute}",
        gamma_stride="i64",
        gammas=("fp32",) * (2 if case.dtype == "fp64" else 1),
        temperature_number="fp64",
        warmup="i64",
        rows="i32",
        C=constant(case.classes),
        STRIDE=constant(case.classes),
        BRANCHES=constant(branches),
        SOFT=constant(case.soft),
        OPTIONS=constant(case.options),
        PLAN=constant(plan),
        COUNTING=constant(launch_plan.COUNTING),
        SUMS=constant(SUMS),
        PACKED=constant(packed_layout(case.modalities)),
    )


@dataclass(frozen=True)
class LabelsCase:
    """One specialisation of the kernel of task "multilabel"."""

    dtype: str = "fp32"
    modalities: int = 2
    grad: bool = True
    mask: bool = False
    weights: bool = False
    reduction: str = "mean"

    @property
    def plan(self) -> launch_plan.PairPlan:
        size = ITEMSIZE[self.dtype]
        more = self.mask or self.weights or self.reduction == "none"
        return launch_plan.pair_plan(size, 4 if self.dtype == "fp16" else size, more)


def labels_arguments(case: LabelsCase) -> dict[str, Any]:
    same = forward_arguments(Case(14, case.dtype, case.modalities, case.grad, True, case.mask))
    weight = same["target"] if case.weights else constant(None)
    own = dict(
        weight=weight,
        pos_weight=weight,
        pairs="i32",
        C=constant(14 if case.mask or case.weights else 1),
        STRIDE=constant(None),
        OPTIONS=constant(Options(reduction=case.reduction, task="multilabel")),
        PLAN=constant(case.plan),
    )
    return {name: (same | own)[name] for name in labels_kernel.arg_names}


def labels_report(case: LabelsCase, name: str) -> Report:
    plan, target = case.plan, TARGETS[name]
    arguments = labels_arguments(case)
    return inspect(target, *compile_kernel(labels_kernel, arguments, target, plan.threads, plan.registers))


def innermost_loops(ptx: str, marker: str) -> list[list[str]]:
    """Instructions of the innermost loops that contain ``marker``; all of the kernel if none does."""
    lines = [line.strip() for line in ptx.splitlines()]
    labels = {found[1]: i for i, line in enumerate(lines) if (found := re.match(r"(\$L\w+):", line))}
    spans = []
    for i, line in enumerate(lines):
        jump = re.search(r"\bbra(?:\.uni)?\s+(\$L\w+);", line)
        if jump and labels.get(jump[1], i) < i and any(marker in x for x in lines[labels[jump[1]] : i]):
            spans.append((labels[jump[1]], i))
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)] or [
        (0, len(lines))
    ]
    return [[x for x in lines[a:b] if ";" in x and not x.startswith((".", "//"))] for a, b in inner]


def inspect_cuda(kernel: Any, said: str) -> Report:
    ptx = kernel.asm["ptx"]
    registers, spills = re.search(r"Used (\d+) registers", said), re.findall(r"(\d+) bytes spill", said)
    assert registers is not None
    assert spills
    loops = innermost_loops(ptx, "ex2.approx")
    return Report(
        registers=int(registers[1]),
        spills=sum(map(int, spills)),
        shared=kernel.metadata.shared,
        loads16=16 * len(re.findall(r"\bld\.global\S*\.v4\.b32|\bld\.global\S*\.v2\.b64", ptx)),
        stores16=16 * len(re.findall(r"\bst\.global\S*\.v4\.b32|\bst\.global\S*\.v2\.b64", ptx)),
        exponentials=sum("ex2.approx" in x for loop in loops for x in loop),
        instructions=sum(map(len, loops)),
    )


def inspect_hip(kernel: Any) -> Report:
    """Spills are bytes of memory: scalar registers that are parked in lanes of vector registers are not."""
    code = kernel.asm["amdgcn"]

    def metadata(name: str) -> int:
        return max(map(int, re.findall(rf"\.{name}:\s+(\d+)", code)), default=0)

    return Report(
        registers=metadata("vgpr_count"),
        spills=4 * metadata("vgpr_spill_count") + metadata("private_segment_fixed_size"),
        shared=kernel.metadata.shared,
        loads16=16 * len(re.findall(r"(?:global|buffer)_load_(?:dwordx4|b128)", code)),
        stores16=16 * len(re.findall(r"(?:global|buffer)_store_(?:dwordx4|b128)", code)),
        exponentials=len(re.findall(r"v_exp_f32", code)),
        instructions=0,
    )


def inspect(target: GPUTarget, kernel: Any, said: str) -> Report:
    return inspect_cuda(kernel, said) if target.backend == "cuda" else inspect_hip(kernel)


def report(case: Case, name: str) -> Report:
    plan, target = case.plan, TARGETS[name]
    return inspect(
        target, *compile_kernel(forward_kernel, forward_arguments(case), target, plan.threads, plan.registers)
    )


def reports(wanted: Sequence[tuple[Case, str]]) -> list[Report]:
    """``report`` of every case and target, on all cores."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(wanted)), context) as pool:
        return list(pool.map(report, *zip(*wanted, strict=True), chunksize=4))


EVERYTHING = dict(soft=True, mask=True, smoothing=0.1, dependence="logit_l1")  # all sums that a row may need


def every_plan(largest: int = 40_000) -> list[Case]:
    """One case for each plan that can be picked, access width and dtype: the plain loss, and all sums."""
    found = []
    for dtype, size in ITEMSIZE.items():
        for options in ({}, EVERYTHING):
            seen: dict[Any, Case] = {}
            for classes in range(1, largest):
                case = Case(classes, dtype, **options)
                seen.setdefault((case.plan, launch_plan.vector(classes, size)), case)
            found += seen.values()
    return found


def backward_reports(name: str, dtype: str = "bf16", modalities: int = 2) -> dict[str, Report]:
    """The kernels other than the forward one."""
    target = TARGETS[name]
    branches = modalities + 1
    pointers = (f"*{dtype}",)
    block, threads = launch_plan.FLAT_BLOCK, launch_plan.FLAT_THREADS
    scale = dict(
        sources=pointers * branches,
        results=pointers * branches,
        upstream="*fp32",
        factor=constant(None),
        size="i64",
        C=constant(1000),
        BRANCHES=constant(branches),
        PER_ROW=constant(False),
        IN_PLACE=constant(True),
        BLOCK=constant(block),
    )
    modulate = dict(
        sources=pointers * modalities,
        results=pointers * modalities,
        sizes=("i32",) * modalities,
        link="*fp32",
        MODALITIES=constant(tuple(range(modalities))),
        TENSORS=constant(modalities),
        BLOCK=constant(block),
    )
    per_row = scale | dict(PER_ROW=constant(True), factor="*fp32", IN_PLACE=constant(False))
    cases = {
        "scale": (scale_kernel, scale),
        "scale per row": (scale_kernel, per_row),
        "modulate": (modulate_kernel, modulate),
    }
    return {
        name: inspect(target, *compile_kernel(kernel, arguments, target, threads, None))
        for name, (kernel, arguments) in cases.items()
    }


def per_logit(case: Case, value: int) -> float:
    """A count per thread and tile as a count per logit of the row (padding is charged to the logits)."""
    plan = case.plan
    tile = plan.steps * plan.owners * plan.lanes
    row = math.ceil(case.classes / tile) * tile if plan.online else tile / plan.owners
    return value * plan.threads / tile * row / case.classes


def predict(case: Case, found: Report, device: Device, rows: int) -> float:
    """Seconds of the forward launch for ``rows`` rows of each branch, by the model above."""
    logits = rows * case.classes * (case.modalities + 1)
    size = ITEMSIZE[case.dtype]
    passes = 1 + case.grad
    dram = logits * size * passes / (device.dram * DRAM_SHARE)
    l2 = logits * size * (passes + (case.plan.online and case.grad)) / device.l2
    cycles = logits * max(per_logit(case, found.instructions) / 128, per_logit(case, found.exponentials) / 16)
    return max(dram, l2, cycles / (device.multiprocessors * device.clock)) + FIXED


def cases(classes: Sequence[int]) -> list[Case]:
    """Every kind of plan (several rows, one row, streamed; aligned, odd), plain and with all sums."""
    plain = [Case(c, d) for c in classes for d in ("fp32", "bf16")] + [
        Case(1000, "fp16"),
        Case(5, "fp64"),
        Case(5000, "fp64"),
    ]
    chosen = [c for c in classes if c in (6, 1000, 8192, 32000, 32001)] or list(classes)
    heavy = [
        case
        for c in chosen
        for case in (
            Case(c, grad=False),
            Case(c, mask=True, modalities=8),
            Case(c, mask=True, smoothing=0.1, dependence="logit_l1"),
            Case(c, mask=True, smoothing=0.1, dependence="logit_l1", soft=True),
        )
    ]
    return plain + heavy


CLASSES = (1, 6, 28, 34, 101, 309, 1000, 2048, 4096, 8191, 8192, 32000, 32001)


def line(case: Case, found: Report, device: str | None) -> str:
    plan = case.plan
    tile = f"{plan.steps}x{plan.owners}x{plan.lanes}" + (" streamed" if plan.online else "")
    time = ""
    if device and case.dtype != "fp64":
        rows = round(2e8 / (case.classes * (case.modalities + 1) * ITEMSIZE[case.dtype]))
        floor = (
            rows
            * case.classes
            * (case.modalities + 1)
            * ITEMSIZE[case.dtype]
            * (1 + case.grad)
            / DEVICES[device].dram
        )
        time = f"{predict(case, found, DEVICES[device], rows) * 1e6:.0f} ({floor * 1e6:.0f})"
    return (
        f"| {case.classes} | {case.dtype} | {case.label} M={case.modalities} | {tile} | {plan.threads} | "
        f"{found.registers} | {found.spills} | {found.shared} | {found.loads16} | {found.stores16} | "
        f"{per_logit(case, found.exponentials):.2f} | "
        f"{per_logit(case, found.instructions):.1f} | {time} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--classes", nargs="+", type=int, default=list(CLASSES))
    parser.add_argument(
        "--every", action="store_true", help="one class count for each plan that the rule can pick, instead"
    )
    arguments = parser.parse_args()
    print(
        f"Triton {version}. ld16/st16: bytes of logits and gradients per thread and tile in 16-byte accesses."
    )
    print(
        "ex2, instr: per logit (float64 has no such loop to count). Time: predicted for 200 MB of logits.\n"
    )
    wanted = every_plan() if arguments.every else cases(arguments.classes)
    for name in arguments.targets:
        device = {"sm_80": "A100", "sm_90": "H200"}.get(name)
        print(f"### {name}\n")
        print(
            "| C | dtype | with | tile | threads | regs | spills | smem | ld16 | st16 | ex2 | instr | "
            f"{device or ''} us (floor) |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
        for case, found in zip(wanted, reports([(case, name) for case in wanted]), strict=True):
            print(line(case, found, device))
        print("\n| kernel | regs | spills | smem | ld16 | st16 |\n|---|---|---|---|---|---|")
        labels = {f"labels {dtype}": labels_report(LabelsCase(dtype), name) for dtype in ITEMSIZE}
        for kernel, found in (labels | backward_reports(name)).items():
            print(
                f"| {kernel} | {found.registers} | {found.spills} | {found.shared} | "
                f"{found.loads16} | {found.stores16} |"
            )
        print(flush=True)


if __name__ == "__main__":
    main()
