"""The CPU row kernels under the address and undefined-behaviour sanitizers (tests/cpp/rows_sanitized.cpp)."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SOURCE = Path(__file__).parent / "cpp" / "rows_sanitized.cpp"
FLAGS = ["-std=c++20", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Wno-psabi"]


VECTORS = {
    "sse2": (16, [], set()),
    "avx2": (32, ["-mavx2", "-mfma"], {"avx2", "fma"}),
    "avx512": (
        64,
        ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"],
        {"avx512f", "avx512dq", "avx512bw", "avx512vl"},
    ),
}


def cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    return set(info.read_text().split()) if info.exists() and platform.machine() == "x86_64" else set()


@pytest.mark.parametrize("name", VECTORS)
def test_rows_under_sanitizers(tmp_path, name):
    size, options, needed = VECTORS[name]
    if not needed <= cpu_flags():
        pytest.skip(f"this CPU has no {name}")
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    vector = [f"-DARL_VECTOR_BYTES={size}", *options]
    program = tmp_path / "rows"
    built = subprocess.run(
        [compiler, *FLAGS, *vector, str(SOURCE), "-o", str(program)], capture_output=True, text=True
    )
    if "cannot find" in built.stderr and "san" in built.stderr:
        pytest.skip("the compiler has no sanitizer libraries")
    assert built.returncode == 0, built.stderr[-3000:]
    ran = subprocess.run([str(program)], capture_output=True, text=True)
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-3000:]
    assert " 0 wrong" in ran.stdout
