"""Compiles the emulation once per version of its sources."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import filelock  # torch brings it

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
COMPILER = shutil.which("g++") or shutil.which("c++")
# A fiber is left and entered with longjmp, which fortified C libraries take for an error.
FLAGS = [
    "-std=c++17",
    "-O1",
    "-g",
    "-fPIC",
    "-shared",
    "-U_FORTIFY_SOURCE",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
]


def unavailable() -> str | None:
    """None, or why nothing can be emulated here."""
    if os.name != "posix":
        return "the emulation needs POSIX contexts"
    return None if COMPILER else "no C++ compiler"


def sources() -> list[Path]:
    return sorted([*CSRC.glob("*.h"), *(CSRC / "cuda").iterdir(), *HERE.glob("*.h"), *HERE.glob("*.cpp")])


@functools.cache
def library() -> ctypes.CDLL:
    """The emulation. Several of pytest's workers may want it at the same time: the first compiles it."""
    with filelock.FileLock(Path(tempfile.gettempdir()) / "arl_fast_emulation.lock"):
        return _library()


def _library() -> ctypes.CDLL:
    content = hashlib.sha256(repr((COMPILER, FLAGS)).encode())
    for path in sources():
        content.update(path.read_bytes())
    folder = Path(tempfile.gettempdir()) / "arl_fast_emulation"
    folder.mkdir(exist_ok=True)
    built = folder / f"{content.hexdigest()[:16]}.so"
    if not built.exists():
        partial = folder / f"{built.stem}.{os.getpid()}"
        command = [
            COMPILER,
            *FLAGS,
            "-include",
            str(HERE / "cuda_emulation.h"),
            "-o",
            str(partial),
            str(HERE / "emulation.cpp"),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the emulation does not compile:\n{done.stderr}")
        partial.rename(built)
    return ctypes.CDLL(str(built))
