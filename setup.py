"""Builds arl_fast._C, the native kernels. Everything else about the package is in pyproject.toml.

ARL_FAST_BUILD=auto  CPU kernels, and CUDA kernels if torch has CUDA and nvcc is there; what cannot
                     be built is left out (default)
ARL_FAST_BUILD=cpu   CPU kernels, or an error
ARL_FAST_BUILD=cuda  CPU and CUDA kernels, or an error
ARL_FAST_BUILD=none  Python only: plain torch on a CPU, Triton on a GPU

Whether a GPU is present is never asked: a build machine needs none. TORCH_CUDA_ARCH_LIST chooses the
architectures.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
NOTE = ROOT / "arl_fast" / "native_build.txt"
MODES = ("auto", "cpu", "cuda", "none")
# Instruction sets beyond the compiler's default, each with its own copy of the row kernels (x86-64 only).
X86_ISAS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
}
KERNEL_FLAGS = ["-std=c++20", "-O3", "-g0", "-fPIC", "-fno-math-errno", "-fvisibility=hidden"]
TORCH_FLAGS = ["-O2", "-g0", "-fvisibility=hidden"]


def build_mode() -> str:
    mode = os.environ.get("ARL_FAST_BUILD") or "auto"
    if mode not in MODES:
        sys.exit(f"ARL_FAST_BUILD: got {mode!r}, expected one of {', '.join(MODES)}")
    return mode


def say(text: str) -> None:
    """Tell the user now, and `python -m arl_fast` later, what is not built and why."""
    print(f"arl_fast: {text}", file=sys.stderr)
    NOTE.write_text(text + "\n")


def is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def no_cpu_build() -> str | None:
    """Why the CPU kernels cannot be built, or None."""
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except ImportError as error:
        return (
            f"torch cannot be imported ({error}); install it first and use pip install --no-build-isolation"
        )
    if sys.platform == "win32":
        return "the kernels need GCC or Clang"
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler ({compiler})"
    return None


def no_cuda_build() -> str | None:
    """Why the CUDA kernels cannot be built, or None."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if not list((ROOT / "csrc/cuda").glob("*.cu")):
        return "csrc/cuda is missing"
    if torch.version.cuda is None:
        return "torch is a build without CUDA"
    if CUDA_HOME is None or not Path(CUDA_HOME, "bin", "nvcc").exists():
        return "nvcc was not found (set CUDA_HOME)"
    release = nvcc_release(Path(CUDA_HOME, "bin", "nvcc"))
    if release[0] != int(torch.version.cuda.split(".")[0]):
        return f"nvcc is CUDA {release[0]}.{release[1]}, but torch was built for CUDA {torch.version.cuda}"
    return None


def nvcc_release(nvcc: Path) -> tuple[int, int]:
    text = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def cuda_library_folders(nvcc: Path) -> list[str]:
    """Where nvcc's own toolkit has libcudart: CUDA_HOME may hold no more than a wrapper of nvcc."""
    text = subprocess.run(
        [str(nvcc), "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
    ).stderr
    return re.findall(r'"-L([^"]+)"', text)


def cuda_architectures(release: tuple[int, int]) -> str:
    """TORCH_CUDA_ARCH_LIST where it is unset: from sm_80 to the newest that this nvcc knows."""
    return "8.0;9.0;10.0+PTX" if release >= (12, 8) else "8.0;9.0+PTX"


def sources(cuda: bool) -> list[str]:
    found = [*(ROOT / "csrc").rglob("*.cpp"), *((ROOT / "csrc").rglob("*.cu") if cuda else ())]
    files = {str(path.relative_to(ROOT)) for path in found}
    files -= {f"csrc/cpu/isa_{isa}.cpp" for isa in X86_ISAS}  # compiled with flags of their own
    return sorted(files if cuda else files - {"csrc/cuda_ops.cpp"})


def extension(cuda: bool) -> dict:
    """The arguments of setup() that build arl_fast._C."""
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

    macros: list[tuple[str, str | None]] = []
    if is_x86():
        macros.append(("ARL_FAST_X86_ISAS", None))
    if cuda:
        macros.append(("ARL_FAST_CUDA", None))
        nvcc = Path(CUDA_HOME, "bin", "nvcc")
        release = nvcc_release(nvcc)
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", cuda_architectures(release))

    class Build(BuildExtension):
        """Compiles the row kernels per instruction set, with flags of their own, before the extension."""

        def build_extensions(self) -> None:
            if is_x86():
                with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
                    for objects in pool.map(self.compile_rows, X86_ISAS):
                        self.extensions[0].extra_objects += objects
            super().build_extensions()

        def compile_rows(self, isa: str) -> list[str]:
            flags = [*KERNEL_FLAGS, *X86_ISAS[isa]]
            return self.compiler.compile(
                [f"csrc/cpu/isa_{isa}.cpp"], output_dir=self.build_temp, extra_postargs=flags
            )

    kind = CUDAExtension if cuda else CppExtension
    native = kind(
        "arl_fast._C",
        sources(cuda),
        define_macros=macros,
        library_dirs=cuda_library_folders(nvcc) if cuda else [],
        extra_compile_args={
            "cxx": [*TORCH_FLAGS, "-fno-math-errno", "-O3"],
            "nvcc": ["-O3", "-lineinfo", "--extended-lambda"],
        },
        depends=[
            str(path.relative_to(ROOT))
            for pattern in ("*.h", "*.inc", "*.cuh")
            for path in (ROOT / "csrc").rglob(pattern)
        ],
    )
    return {"ext_modules": [native], "cmdclass": {"build_ext": Build}, "version": version(for_torch=True)}


def version(for_torch: bool = False) -> str:
    """The package's version; that of a wheel with the extension names its torch, as in 0.1.0+torch2.13."""
    text = (ROOT / "arl_fast" / "__init__.py").read_text()
    found = re.search(r'^__version__ = "(.*)"$', text, re.MULTILINE)[1]
    if for_torch and not {"bdist_wheel", "dist_info"}.isdisjoint(sys.argv):
        import torch

        found += "+torch" + ".".join(torch.__version__.split(".")[:2])
    return found


def arguments() -> dict:
    mode = build_mode()
    NOTE.unlink(missing_ok=True)
    if mode == "none":
        say("Python only, as ARL_FAST_BUILD=none asks")
        return {}
    reason = no_cpu_build()
    if reason is not None:
        if mode != "auto":
            sys.exit(f"arl_fast: ARL_FAST_BUILD={mode}, but {reason}")
        say(f"Python only: {reason}")
        return {}
    reason = no_cuda_build() if mode != "cpu" else "ARL_FAST_BUILD=cpu"
    if reason is not None:
        if mode == "cuda":
            sys.exit(f"arl_fast: ARL_FAST_BUILD=cuda, but {reason}")
        say(f"no CUDA kernels: {reason}")
    return extension(cuda=reason is None)


setup(**{"version": version(), **arguments()})
