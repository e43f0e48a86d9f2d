"""What nvcc makes of the kernels: no spills, as few registers as the plan counts on, 16-byte loads.

Compiles every source for every architecture, about a minute per architecture on one core.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
ARCHITECTURES = ["sm_80", "sm_90", "sm_100"]
NVCC = shutil.which("nvcc")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(NVCC is None, reason="no nvcc")]

SMALL, WARP, BLOCK = range(3)
# Registers per thread: 64 K over the threads that csrc/cuda/plan.h counts as resident, in steps of 8.
REGISTERS = {
    # (family, heavy)
    (SMALL, False): 80,
    (SMALL, True): 128,
    (WARP, False): 128,
    (BLOCK, False): 128,
    (BLOCK, True): 255,
}
OTHER_REGISTERS = {
    "scale_kernel": 40,
    "modulate_kernel": 40,
    "count_kernel": 40,
    "count_pairs_kernel": 40,
    "empty_kernel": 40,
    "labels_kernelId": 128,
    "labels_kernelIf": 64,
    "labels_kernelI13__nv_bfloat16Lb0": 80,
    "labels_kernelI13__nv_bfloat16Lb1ELb0": 128,
    "labels_kernelI13__nv_bfloat16Lb1ELb1": 255,
    "labels_kernelI6__halfLb0": 80,
    "labels_kernelI6__halfLb1ELb0": 128,
    "labels_kernelI6__halfLb1ELb1": 255,
}
STATIC_SHARED = 8192  # kStaticShared


class Kernel:
    """One kernel of one cubin: what ptxas reports, and how often each instruction occurs in it."""

    def __init__(self, name: str, spills: int, registers: int, shared: int) -> None:
        self.name, self.spills, self.registers, self.shared = name, spills, registers, shared
        self.instructions: collections.Counter[str] = collections.Counter()
        forward = re.search(r"forward_kernelI(d|f|13__nv_bfloat16|6__half)Li(\d)ELb(\d)", name)
        self.forward = bool(forward)
        if forward:
            self.dtype, self.family, self.dense = forward[1], int(forward[2]), forward[3] == "1"
            self.heavy = self.dense or self.dtype == "d"

    def count(self, prefix: str) -> int:
        return sum(n for name, n in self.instructions.items() if name.startswith(prefix))

    def __repr__(self) -> str:
        use = f"{self.registers} registers, {self.spills} bytes of spills, {self.shared} bytes shared"
        return f"{self.name} ({use})"


def disassembler() -> str | None:
    found = shutil.which("cuobjdump")
    if found is None:
        try:
            import triton

            bundled = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
            found = str(bundled) if bundled.exists() else None
        except ImportError:
            pass
    return found


def compile_source(source: Path, architecture: str) -> list[Kernel]:
    version = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    content = hashlib.sha256(repr((version, architecture, source.name)).encode())
    for path in sorted([*CSRC.glob("*.h"), *(CSRC / "cuda").iterdir()]):
        content.update(path.read_bytes())
    folder = Path(tempfile.gettempdir()) / "arl_fast_nvcc"
    folder.mkdir(exist_ok=True)
    cubin = folder / f"{source.stem}.{architecture}.{content.hexdigest()[:16]}.cubin"
    report = cubin.with_suffix(".txt")
    if not report.exists():
        partial = folder / f"{cubin.stem}.{os.getpid()}"
        command = [
            NVCC,
            "-std=c++17",
            "-O3",
            f"-arch={architecture}",
            "-cubin",
            "-Werror",
            "all-warnings",
            "-Xptxas",
            "-v",
        ]
        done = subprocess.run([*command, "-o", str(partial), str(source)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        partial.rename(cubin)
        report.write_text(done.stdout + done.stderr)
    kernels: dict[str, Kernel] = {}
    pattern = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)"
    )
    for name, stores, loads, registers, rest in re.findall(pattern, report.read_text(), re.S):
        shared = re.search(r"(\d+) bytes smem", rest)
        kernels[name] = Kernel(
            name, int(stores) + int(loads), int(registers), int(shared[1]) if shared else 0
        )
    tool = disassembler()
    if tool:
        current = None
        for line in subprocess.run(
            [tool, "--dump-sass", str(cubin)], capture_output=True, text=True, check=True
        ).stdout.splitlines():
            if "Function : " in line:
                current = kernels.get(line.split("Function : ")[1].strip())
            found = re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)", line)
            if found and current:
                current.instructions[found[1]] += 1
    return list(kernels.values())


@functools.cache
def kernels(architecture: str) -> list[Kernel]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [
            k
            for found in pool.map(lambda source: compile_source(source, architecture), SOURCES)
            for k in found
        ]


def forward_kernels(architecture: str) -> list[Kernel]:
    return [k for k in kernels(architecture) if k.forward]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_registers_and_shared_memory(architecture):
    found = kernels(architecture)
    # small and block, plain and dense; warp for all but float64
    assert len(forward_kernels(architecture)) == 4 * 4 + 3
    for k in found:
        assert k.spills == 0, k
        assert k.shared <= STATIC_SHARED, k
        if k.forward:
            assert k.registers <= REGISTERS[k.family, k.heavy], k
        else:
            assert k.registers <= next(limit for name, limit in OTHER_REGISTERS.items() if name in k.name), k


@pytest.mark.skipif(NVCC is not None and disassembler() is None, reason="no cuobjdump")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_machine_code(architecture):
    """A thread's vectors are loaded by as many 16-byte loads, stored by 16-byte stores, with one exponential
    per element.
    """
    for k in forward_kernels(architecture):
        assert k.count("LDL") == k.count("STL") == 0, k
        if k.family == SMALL:
            continue
        half_precision = k.dtype not in "df"
        vectors = 4 if half_precision and k.family == WARP else 8
        stores = 2 * vectors if "half" in k.dtype else vectors  # float32 gradients of float16 logits
        assert k.count("LDG.E.128") >= vectors, k
        assert k.count("STG.E.128") >= stores, k
        if k.family == BLOCK and k.dtype != "d":
            assert k.count("LDS.128"), k
        if k.family == BLOCK:
            # from global to shared memory without a register between: several copies are in flight at a time
            assert k.count("LDGSTS.E.BYPASS.128") >= 4, k
            assert k.count("CCTL.E.PF2"), k  # the next row, into L2
            assert bool(k.count("UCGABAR_WAIT")) == (architecture != "sm_80"), k  # clusters share a row
        if k.family == WARP:
            elements = vectors * (8 if half_precision else 4)
            assert elements <= k.count("MUFU.EX2") <= elements + 12, k  # and a few per row
    for k in kernels(architecture):
        if "labels_kernel" in k.name:  # logits, labels and gradients of a vector, in its rows without gaps
            assert k.count("LDL") == k.count("STL") == 0, k
            half_precision = k.name.split("labels_kernelI")[1][0] not in "df"
            assert k.count("LDG.E.128") >= (3 if half_precision else 2), k
            assert k.count("STG.E.128"), k
            if "labels_kernelId" not in k.name:  # one exponential for a pair, and a few in the rule
                assert k.count("MUFU.EX2") <= (8 if half_precision else 4) + 8, k
        if "scale_kernel" in k.name or "modulate_kernel" in k.name:
            assert k.count("LDG.E.128"), k
            assert k.count("STG.E.128"), k
            assert not k.count("LDG.E.U8"), k


def test_there_is_one_report_per_source():
    parts = {"forward_f64", "forward_f32", "forward_bf16", "forward_f16", "forward", "labels", "backward"}
    assert {path.stem for path in SOURCES} == parts
