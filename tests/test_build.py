"""Building: a Python install without the native kernels that works and says why they are absent, and flags of
the user.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what setup.py needs, so that nothing in this checkout is touched."""
    for name in ("setup.py", "pyproject.toml", "README.md", "csrc", "arl_fast"):
        target = tmp_path / name
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, target, ignore=shutil.ignore_patterns("_C*", "__pycache__", "native_build.txt")
            )
        else:
            target.write_bytes((ROOT / name).read_bytes())
    return tmp_path


def build(checkout: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(
        command, cwd=checkout, env={**os.environ, **environment}, capture_output=True, text=True
    )


# An editable install of this checkout would lend its extension to the copy.
REPORT = """
import runpy, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
runpy.run_module("arl_fast", run_name="__main__")
"""


def report(checkout: Path) -> str:
    return subprocess.run(
        [sys.executable, "-c", REPORT], cwd=checkout, capture_output=True, text=True, check=True
    ).stdout


def test_python_only(checkout):
    assert build(checkout, ARL_FAST_BUILD="none").returncode == 0
    text = report(checkout)
    assert "cpu: reference" in text
    assert "Python only, as ARL_FAST_BUILD=none asks" in text


def test_without_a_compiler(checkout):
    assert build(checkout, ARL_FAST_BUILD="auto", CXX="no-such-compiler").returncode == 0
    assert "there is no C++ compiler (no-such-compiler)" in report(checkout)
    done = build(checkout, ARL_FAST_BUILD="cpu", CXX="no-such-compiler")
    assert done.returncode != 0
    assert "ARL_FAST_BUILD=cpu, but there is no C++ compiler" in done.stderr


def test_an_extension_for_another_torch_is_not_used():
    code = """
import runpy, sys, types
sys.modules["arl_fast._C"] = types.SimpleNamespace(torch="1.0")
runpy.run_module("arl_fast", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "cpu: reference" in done.stdout, done.stderr
    assert "arl_fast._C was built for torch 1.0, this is torch" in done.stdout


def test_a_wrong_mode_is_named(checkout):
    done = build(checkout, ARL_FAST_BUILD="gpu")
    assert done.returncode != 0
    assert "ARL_FAST_BUILD: got 'gpu', expected one of auto, cpu, cuda, none" in done.stderr


def test_the_note_stays_out_of_version_control():
    assert "arl_fast/native_build.txt" in (ROOT / ".gitignore").read_text()


@pytest.mark.parametrize("name", ["isa_baseline", "isa_avx2"])
def test_a_users_flags_do_not_change_the_width_of_vectors(name):
    """CXXFLAGS=-march=native reaches every copy of the row kernels, on a CPU with AVX-512 the narrower ones,
    too.
    """
    compiler = shutil.which("g++")
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("no g++, or no x86-64")
    command = [
        compiler,
        "-std=c++20",
        "-fsyntax-only",
        "-w",
        "-march=skylake-avx512",
        str(ROOT / f"csrc/cpu/{name}.cpp"),
    ]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr[-2000:]
