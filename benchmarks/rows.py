"""One JSON object per line and measurement, written at once, so that a run that is cut off keeps its rows.

Columns of a microbenchmark:
    kind, device, torch, python, triton, cuda, driver, commit, load, date
                             where it was measured
    suite, batch, classes, modalities, dtype, threads
                             what was measured
    contender, what          "forward" without gradients, "backward" alone, or "both"
    cache                    "warm": repeated on the same tensors; "cold": caches flushed before every call
    clock                    the host's: perf_counter, or process_time for one thread on a CPU
    host_us                  {median, q1, q3, n}: the caller's time. On a GPU it is that of enqueueing: the
                             clock stops before the device has finished. On a CPU it is the whole time
    device_us, device_method {median, q1, q3, n}: the GPU's own time, from the replay of a CUDA graph, or
                             between two events behind a sleeping kernel where the step cannot be captured
    operations               torch operations called, fused ones of a compiled step counted once (CPU)
    launches, launches_forward
                             kernels, memsets and copies enqueued
    syncs                    waits of the host for the device (GPU)
    floor_bytes, floor_share 2 (M+1) B C e, and the share of the measured copy bandwidth, counted at it
    peak_bytes, peak_ratio   most memory held at a time beyond the inputs, also relative to the logits
    errors                   relative errors against float64 truth: the gate
    rejected                 instead of all numbers: why the contender was not timed
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
KEY = (
    "kind",
    "device",
    "experiment",
    "suite",
    "batch",
    "classes",
    "modalities",
    "dtype",
    "threads",
    "contender",
    "what",
    "cache",
)


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of times in seconds, as microseconds."""
    micro = sorted(1e6 * s for s in samples)
    q1, median, q3 = statistics.quantiles(micro, n=4, method="inclusive") if len(micro) > 1 else micro * 3
    return {"median": round(median, 3), "q1": round(q1, 3), "q3": round(q3, 3), "n": len(micro)}


def append(path: str | Path, rows: Iterable[Row]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def read(path: str | Path) -> list[Row]:
    """The rows of a file; of repeated measurements in one file the last counts."""
    with open(path) as file:
        found = [json.loads(line) for line in file if line.strip()]
    return list({key(row): row for row in found}.values())


def key(row: Row) -> tuple:
    """What identifies a measurement across runs."""
    return tuple(row.get(name) for name in KEY)


def time_of(row: Row, which: str | None = None) -> dict[str, float] | None:
    """The time that matters on the row's device: the GPU's own, or the host's on a CPU."""
    return row.get(which or ("device_us" if row.get("kind") == "cuda" else "host_us"))
