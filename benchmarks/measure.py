"""How a step is measured: what is called, the host's time, the device's time, counts and memory."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from . import machine, truth
from .cases import Case
from .contenders import Contender, statistics

WHATS = ("both", "forward", "backward")


class Step:
    """One contender on one case: forward without gradients, backward alone, or both, on the same tensors.

    Gradients are asked of the logits and, as in a training step, of the link. The upstream gradient is 1.
    """

    def __init__(self, contender: Contender, case: Case, logits: list[Tensor], target: Tensor) -> None:
        self.contender, self.case, self.target = contender, case, target
        self.given = logits
        # a repetition then runs on the last one's gradients; memory traffic stays the same
        if contender.in_place:
            logits = [x.clone() for x in logits]
        self.inputs = [x.detach() for x in logits]
        self.leaves = [x.detach().requires_grad_() for x in logits]
        self.link = torch.zeros(case.modalities, device=target.device, requires_grad=True)
        self.wanted = (
            self.leaves[:1] if contender.fused_only else self.leaves + ([self.link] if contender.ours else [])
        )

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.contender.loss(self.inputs, self.target, self.link)[0]

    def record(self) -> Tensor:
        """Forward with gradients recorded."""
        return self.contender.loss(self.leaves, self.target, self.link)[0]

    def backward(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, self.wanted)

    def both(self) -> tuple[Tensor, ...]:
        return self.backward(self.record())

    def gate(self) -> dict[str, float]:
        """Relative errors against float64 truth; raises truth.Rejected. Runs the contender for the first
        time.
        """
        c, device = self.contender, self.target.device
        loss, outcome = c.loss(self.leaves, self.target, self.link)
        stats = statistics(outcome)
        covered = 1 if c.fused_only else len(self.leaves)
        grads = self.backward(loss)[:covered]
        if stats is not None:
            stats = {name: value.to(device) for name, value in stats.items()}
        return truth.check(
            self.given, self.target, loss.detach(), grads, stats, c.dependence, c.floor, covered, c.coarse
        )


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def loops_for(call: Callable[[], Any], device: str, seconds: float, launches: int = 1) -> int:
    """How many calls make one sample last ``seconds``; on a GPU no more than its queue of launches holds."""
    call()
    synchronize(device)
    begin = time.perf_counter()
    call()
    synchronize(device)
    once = time.perf_counter() - begin
    loops = max(1, round(seconds / max(once, 1e-7)))
    return min(loops, max(1, 400 // max(1, launches))) if device == "cuda" else loops


def host_samples(
    step: Step, what: str, device: str, loops: int, rounds: int, pedantic: Callable
) -> list[float]:
    """Seconds per call, one sample per round of ``loops`` calls, after a round that does not count.

    ``pedantic`` is that of pytest-benchmark. The clock stops before the device has finished. For "backward"
    the graphs are built outside the clock.
    """
    results: list[Any] = [None] * loops

    def prepare() -> tuple[tuple, dict]:
        results[:] = [None] * loops
        graphs = [step.record() for _ in range(loops)] if what == "backward" else []
        synchronize(device)
        return (graphs,), {}

    if what == "backward":

        def call(graphs: list[Tensor]) -> None:
            for loss in graphs:
                step.backward(loss)
    else:
        one = getattr(step, what)

        def call(graphs: list[Tensor]) -> None:
            for _ in range(loops):
                one()

    samples = pedantic(call, setup=prepare, rounds=rounds, warmup_rounds=1)
    synchronize(device)
    return [s / loops for s in samples]


def cold_samples(step: Step, device: str, rounds: int, timer: Callable[[], float]) -> list[float]:
    """Seconds of single calls of forward and backward, the caches flushed before each (CPU)."""
    samples = []
    for _ in range(rounds):
        machine.flush(device)
        begin = timer()
        step.both()
        samples.append(timer() - begin)
    return samples


class DeviceTimer:
    """The GPU's own time of one call.

    A step that never waits for the device is captured in a CUDA graph, whose replays have no gaps for the
    host in them. Any other step runs between two events behind a sleeping kernel; if it waits, the gaps are
    its own.
    """

    def __init__(self, call: Callable[[], Any], bytes_per_call: int, syncs: int) -> None:
        self.call = call
        self.repeat = max(1, min(20, (64 << 20) // max(1, bytes_per_call)))
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.method = "graph"
        try:
            if syncs:
                raise RuntimeError(f"{syncs} synchronisations")
            for repeat in {1, self.repeat}:
                self.graphs[repeat] = self._capture(repeat)
        except Exception as error:  # whatever keeps a step from being captured is a finding, not a failure
            self.method = f"events ({str(error).splitlines()[0][:80]})"
            self.graphs = {}
            torch.cuda.synchronize()

    def _capture(self, repeat: int) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(repeat):
                self.call()
        graph.replay()
        torch.cuda.synchronize()
        return graph

    def samples(self, cache: str, rounds: int) -> list[float]:
        """Seconds per call: "warm" back to back on the same tensors, "cold" with the L2 cache flushed before
        each.
        """
        repeat = self.repeat if cache == "warm" else 1
        run = self.graphs[repeat].replay if self.graphs else self.call
        per_sample = repeat if self.graphs else 1
        events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(rounds)
        ]
        run()
        for start, end in events:
            if cache == "cold":
                machine.flush("cuda")
            if not self.graphs:
                torch.cuda._sleep(1_000_000)
            start.record()
            run()
            end.record()
            if not self.graphs:
                torch.cuda.synchronize()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 / per_sample for start, end in events]


def count_syncs(call: Callable[[], Any]) -> int:
    """How often the host waits for the GPU in one call, as torch's own sync debug mode sees it."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    return sum("synchroniz" in str(w.message) for w in caught)


def count_launches(call: Callable[[], Any]) -> int:
    """Kernels, memsets and copies that one call puts on the device."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())


def count_on_cpu(call: Callable[[], Any]) -> dict[str, int]:
    """Of one call: its torch operations, and the most memory it holds at a time.

    Operations are the outermost ones and graph nodes; a fused or compiled one counts once. Memory is what
    comes on top of what existed before; results count, inputs do not.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        keep = call()

    def operation(name: str) -> bool:
        return "::" in name and not name.startswith(("autograd::", "profiler::"))

    def nested(event: Any) -> bool:
        while (event := event.cpu_parent) is not None:
            if operation(event.name):
                return True
        return False

    held = peak = 0
    for event in sorted(
        (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"),
        key=lambda e: e.start_ns(),
    ):
        held += event.nbytes()
        peak = max(peak, held)
    # memory of an allocator that the profiler does not see counts at least where it is returned
    results = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in (keep if isinstance(keep, tuple) else (keep,))
    }
    peak = max(peak, sum(results.values()))
    return {
        "operations": sum(operation(e.name) and not nested(e) for e in profiler.events()),
        "peak_bytes": peak,
    }


def peak_bytes(call: Callable[[], Any]) -> int:
    """Most GPU memory that one call holds at a time, beyond what existed before it."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
