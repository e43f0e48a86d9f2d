"""Where numbers come from: device, versions, commit; the copy bandwidth that rows are compared with; warm
clocks.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def cpu_model() -> str:
    """The processor's own name, and its vector width: names in virtual machines are often cut short."""
    info = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    name = re.search(r"model name\s*:\s*(.*)", info)
    found = {key: re.search(rf"{key}\s*:\s*(\d+)", info) for key in ("cpu family", "model")}
    place = ", ".join(f"{key.removeprefix('cpu ')} {m[1]}" for key, m in found.items() if m)
    return f"{name[1] if name else platform.machine()} ({place}; {torch.backends.cpu.get_cpu_capability()})"


@functools.cache
def commit() -> str:
    """Short commit hash, with + if the sources differ from it; the environment's ARL_FAST_COMMIT where there
    is no git.
    """
    found = _run("git", "rev-parse", "--short=10", "HEAD")
    if not found:
        return os.environ.get("ARL_FAST_COMMIT", "unknown")
    return found + (
        "+" if _run("git", "status", "--porcelain", "-uno", "--", "arl_fast", "csrc", "setup.py") else ""
    )


@functools.cache
def triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def have_pytest_benchmark() -> bool:
    return importlib.util.find_spec("pytest_benchmark") is not None


@functools.cache
def describe(device: str) -> dict[str, Any]:
    """The columns that every row of a run carries."""
    columns = dict(
        kind=device,
        device=torch.cuda.get_device_name() if device == "cuda" else cpu_model(),
        torch=torch.__version__,
        python=platform.python_version(),
        triton=triton_version(),
        commit=commit(),
        load=round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        date=time.strftime("%Y-%m-%d", time.gmtime()),
    )
    if device == "cuda":
        driver = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
        columns |= dict(cuda=torch.version.cuda, hip=torch.version.hip, driver=driver[0] if driver else None)
    return columns


def slug(device: str) -> str:
    """File name for this machine's rows."""
    name = describe(device)["device"].lower()
    return re.sub(r"[^a-z0-9]+", "-", name.split(" (")[0] if device == "cuda" else "cpu " + name).strip("-")


def timer(device: str, threads: int) -> Callable[[], float]:
    """The host's clock. One thread on a CPU: its CPU time, which is the same on an idle machine and bears
    others' load.
    """
    return time.process_time if device == "cpu" and threads == 1 else time.perf_counter


def copy_bandwidth(device: str, megabytes: int | None = None) -> float:
    """Bytes per second, read plus written, of the best large copy that torch makes (with the threads now
    set).
    """
    size = (megabytes or (4096 if device == "cuda" else 128)) << 18
    source = torch.randn(size, device=device)
    copy = torch.empty_like(source)
    seconds = []
    for _ in range(12):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            copy.copy_(source)
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
        else:
            clock = timer(device, torch.get_num_threads())
            begin = clock()
            copy.copy_(source)
            seconds.append(clock() - begin)
    return 2 * 4 * size / statistics.median(seconds[2:])


def warm_up(device: str, seconds: float = 0.3) -> None:
    """Keep the device busy until its clocks have settled."""
    a = torch.randn(2048 if device == "cuda" else 256, 2048 if device == "cuda" else 256, device=device)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()


@functools.cache
def _flush_buffer(device: str) -> torch.Tensor:
    return torch.empty((512 if device == "cuda" else 96) << 18, device=device)


def flush(device: str) -> None:
    """Evict what the caches hold by writing a buffer several times their size."""
    _flush_buffer(device).fill_(1.0)
