"""The CPU row kernels under AddressSanitizer and UndefinedBehaviorSanitizer, without torch (tests/cpp/rows_sanitized.cpp)."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "cpp" / "rows_sanitized.cpp"
FLAGS = ["-std=c++20", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Wno-psabi"]


def cpu_has_avx2() -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and " avx2 " in info.read_text() and platform.machine() == "x86_64"


def test_rows_under_sanitizers(tmp_path):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    vector = ["-DARL_VECTOR_BYTES=32", "-mavx2", "-mfma"] if cpu_has_avx2() else ["-DARL_VECTOR_BYTES=16"]
    program = tmp_path / "rows"
    built = subprocess.run([compiler, *FLAGS, *vector, str(SOURCE), "-o", str(program)], capture_output=True, text=True)
    if "cannot find" in built.stderr and "san" in built.stderr:
        pytest.skip("the compiler has no sanitizer libraries")
    assert built.returncode == 0, built.stderr[-3000:]
    ran = subprocess.run([str(program)], capture_output=True, text=True)
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-3000:]
    assert " 0 wrong" in ran.stdout
