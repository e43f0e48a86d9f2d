"""Compiles the emulation once per version of its sources."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

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
    "-pthread",
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


def _hash(paths: Sequence[Path], *more: object) -> str:
    content = hashlib.sha256(repr((COMPILER, more)).encode())
    for path in paths:
        content.update(path.read_bytes())
    return content.hexdigest()[:16]


def _run(command: Sequence[object]) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line]
        raise RuntimeError("the emulation does not compile:\n" + "\n".join(errors or [done.stderr]))


BINDING = ["cuda_ops.cpp", "eager/inputs.cpp", "eager/loss.cpp", "eager/modulate.cpp"]


@functools.cache
def binding() -> ModuleType:
    """csrc/cuda_ops.cpp and the eager step, linked with the emulation: a Python module for CPU tensors."""
    emulated = Path(library()._name)
    with filelock.FileLock(Path(tempfile.gettempdir()) / "arl_fast_binding.lock"):
        return _binding(emulated)


def _binding(emulated: Path) -> ModuleType:
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    files = [*(CSRC / name for name in BINDING), HERE / "binding.cpp"]
    headers = sorted([*CSRC.glob("*.h"), *CSRC.glob("*/*.h")])
    flags = ["-std=c++20", "-O1", "-fPIC", "-w", "-DARL_FAST_CUDA_ON_CPU"]
    flags += [
        "-DTORCH_EXTENSION_NAME=arl_cuda_binding",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
    ]
    folder = emulated.parent / _hash([*files, *headers], emulated.name, flags, torch.__version__)
    built = folder / "arl_cuda_binding.so"
    if not built.exists():
        folder.mkdir(exist_ok=True)
        includes = [f"-I{path}" for path in [*include_paths(), sysconfig.get_paths()["include"]]]
        objects = [folder / f"{file.stem}.{os.getpid()}.o" for file in files]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            commands = [
                [COMPILER, *flags, *includes, "-c", file, "-o", out]
                for file, out in zip(files, objects, strict=True)
            ]
            list(pool.map(_run, commands))
        libraries = [f"-L{path}" for path in library_paths()]
        libraries += ["-ltorch", "-ltorch_cpu", "-ltorch_python", "-lc10"]
        partial = folder / f"partial.{os.getpid()}"
        link = [COMPILER, "-shared", *objects, emulated, f"-Wl,-rpath,{emulated.parent}", *libraries]
        _run([*link, "-o", partial])
        partial.rename(built)
    spec = importlib.util.spec_from_file_location("arl_cuda_binding", built)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def library() -> ctypes.CDLL:
    """The emulation. Several of pytest's workers may want it at the same time: the first compiles it."""
    with filelock.FileLock(Path(tempfile.gettempdir()) / "arl_fast_emulation.lock"):
        return _library()


def _library() -> ctypes.CDLL:
    folder = Path(tempfile.gettempdir()) / "arl_fast_emulation"
    folder.mkdir(exist_ok=True)
    built = folder / f"{_hash(sources(), FLAGS)}.so"
    if not built.exists():
        partial = folder / f"{built.stem}.{os.getpid()}"
        header, source = HERE / "cuda_emulation.h", HERE / "emulation.cpp"
        _run([COMPILER, *FLAGS, "-include", header, "-o", partial, source])
        partial.rename(built)
    return ctypes.CDLL(str(built))
