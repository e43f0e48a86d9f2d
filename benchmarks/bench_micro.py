"""Microbenchmarks of the loss: ``python -m pytest benchmarks/bench_micro.py --suites=paper --rows=FILE``.

Contenders take turns, and the order is rotated: each is measured ``--rotations`` times, its samples are
pooled. Rows are written when a case is complete. A contender that fails the correctness gate is not timed; if
it is arl_fast's own, the test fails.
"""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks import machine, measure, rows, truth
from benchmarks.cases import SUITES, Case, make
from benchmarks.contenders import Contender, contenders

LARGE = 1 << 22  # elements from which a single call is a sample
# elements from which a CPU takes one sample per rotation: no cache holds them, so none is warm either
HUGE = 1 << 26


class Session:
    """The case being measured: its inputs, its contenders' steps, and what was measured of them so far."""

    def __init__(self, config: pytest.Config) -> None:
        self.device: str = config.getoption("--device")
        self.threads: int = config.getoption("--threads")
        self.path: str | None = config.getoption("--rows")
        self.sample: float = config.getoption("--sample")
        self.rounds: int = config.getoption("--rounds")
        self.timer = machine.timer(self.device, self.threads)
        self.case: Case | None = None
        self.bandwidth: float | None = None

    def enter(self, case: Case) -> None:
        if case == self.case:
            return
        self.leave()
        if self.bandwidth is None:
            torch.set_num_threads(self.threads)
            tiny = case.suite == "tiny"
            self.bandwidth = machine.copy_bandwidth(self.device, 1 if tiny else None)
        machine.warm_up(self.device, 0.01 if case.suite == "tiny" else 0.3)
        self.case = case
        self.logits, self.target = make(case, self.device)
        self.steps: dict[str, measure.Step | str] = {}
        self.facts: dict[str, dict[str, Any]] = {}
        self.timers: dict[tuple[str, str], measure.DeviceTimer] = {}
        self.loops: dict[tuple[str, str], int] = {}
        self.samples: dict[tuple[str, str, str, str], list[float]] = defaultdict(list)

    def step(self, contender: Contender) -> measure.Step:
        """The contender's step, gated and counted the first time. Raises truth.Rejected every time if the
        gate said no.
        """
        assert self.case is not None
        found = self.steps.get(contender.name)
        if found is None:
            try:
                found = measure.Step(contender, self.case, self.logits, self.target)
                errors = found.gate()
                self.facts[contender.name] = self._facts(found) | {
                    "errors": {k: float(f"{v:.2g}") for k, v in errors.items()}
                }
            except truth.Rejected as reason:
                found = str(reason)
            except Exception as error:  # a contender that breaks is reported, the others go on
                found = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
            self.steps[contender.name] = found
        if isinstance(found, str):
            raise truth.Rejected(found)
        return found

    def _facts(self, step: measure.Step) -> dict[str, Any]:
        """What is counted once per contender and case."""
        assert self.case is not None
        if self.device != "cuda":
            huge = self.case.elements >= HUGE
            return {
                what: measure.count_on_cpu(getattr(step, what))
                for what in (("both",) if huge else ("both", "forward"))
            }
        found = {}
        for what in ("both", "forward"):
            call = getattr(step, what)
            found[what] = {"peak_bytes": measure.peak_bytes(call)}
            found[what] |= {"launches": measure.count_launches(call), "syncs": measure.count_syncs(call)}
        found["both"]["launches_forward"] = measure.count_launches(step.record)
        return found

    def measure(self, contender: Contender, what: str, pedantic: Any) -> None:
        assert self.case is not None
        step = self.step(contender)
        name, facts = contender.name, self.facts[contender.name]
        large = self.case.elements >= LARGE
        huge = self.device == "cpu" and self.case.elements >= HUGE
        rounds = 1 if huge else self.rounds
        call = step.both if what == "backward" else getattr(step, what)
        if (name, what) not in self.loops:
            launches = facts["both"].get("launches", 1)
            self.loops[name, what] = (
                1 if large else measure.loops_for(call, self.device, self.sample, launches)
            )
        samples = measure.host_samples(step, what, self.device, self.loops[name, what], rounds, pedantic)
        self.samples[name, what, "warm", "host"] += samples
        if what == "backward":
            return
        if self.device == "cuda":
            if (name, what) not in self.timers:
                self.timers[name, what] = measure.DeviceTimer(
                    call, facts[what]["peak_bytes"] + 1, facts[what]["syncs"]
                )
            for cache in ("warm", "cold"):
                self.samples[name, what, cache, "device"] += self.timers[name, what].samples(cache, rounds)
        elif what == "both" and not huge and not self.case.suite.startswith("scaling"):
            self.samples[name, what, "cold", "host"] += measure.cold_samples(step, self.device, 3, self.timer)

    def leave(self) -> None:
        """Write the rows of the case that is complete."""
        case, self.case = self.case, None
        if case is None:
            return
        common = machine.describe(self.device) | {"experiment": "micro"} | case._asdict()
        common["threads"] = torch.get_num_threads() if self.device == "cpu" else None
        common["clock"] = self.timer.__name__
        out = [
            common | {"contender": name, "rejected": why}
            for name, why in self.steps.items()
            if isinstance(why, str)
        ]
        for name, what, cache in dict.fromkeys(k[:3] for k in self.samples):
            facts = self.facts[name]
            row = (
                common
                | {"contender": name, "what": what, "cache": cache, "errors": facts["errors"]}
                | facts.get(what, {})
            )
            for which in ("host", "device"):
                if samples := self.samples.get((name, what, cache, which)):
                    row[f"{which}_us"] = rows.summary(samples)
            if (name, what) in self.timers:
                row["device_method"] = self.timers[name, what].method
            row["copy_bytes_per_s"] = float(f"{self.bandwidth:.4g}")
            if what == "both" and (taken := rows.time_of(row)):
                branches = 1 if name == "torch CE, fused only" else case.modalities + 1
                row["floor_bytes"] = case.floor_bytes * branches // (case.modalities + 1)
                row["floor_share"] = round(row["floor_bytes"] / (taken["median"] * 1e-6) / self.bandwidth, 4)
            if "peak_bytes" in row:
                row["peak_ratio"] = round(row["peak_bytes"] / (case.floor_bytes / 2), 3)
            out.append(row)
        if self.path:
            rows.append(self.path, out)
        self.steps, self.timers, self.samples = {}, {}, defaultdict(list)
        self.logits, self.target = [], torch.empty(0)
        _cached.clear()
        truth.forget()
        torch.compiler.reset()
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()


_cached: dict[Case, list[Contender]] = {}


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest) -> Iterator[Session]:
    from arl_fast.implementations import dispatch

    before, threads = dispatch.override, torch.get_num_threads()
    current = Session(request.config)
    yield current
    current.leave()
    dispatch.override = before
    torch.set_num_threads(threads)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """By case, then by rotation, then the contenders in an order that moves on by one each time."""
    option = metafunc.config.getoption
    device, chosen = option("--device"), []
    clock = pytest.mark.benchmark(timer=machine.timer(device, option("--threads")))
    for suite in option("--suites").split(","):
        for case in SUITES[suite]:
            names = [
                c.name
                for c in contenders(case, device, not option("--no-compile"), option("--only-compiled"))
            ]
            whats = ("both",) if suite.startswith("scaling") else measure.WHATS
            if device == "cpu" and case.elements >= HUGE:
                whats = ("both", "forward")
            for rotation in range(option("--rotations")):
                turn = rotation % len(names)
                for name in names[turn:] + names[:turn]:
                    for what in whats:
                        chosen.append(
                            pytest.param(
                                case, name, what, id=f"{case.label}-{name}-{what}-{rotation}", marks=clock
                            )
                        )
    metafunc.parametrize(("case", "name", "what"), chosen)


def test_micro(
    session: Session, benchmark: Any, request: pytest.FixtureRequest, case: Case, name: str, what: str
) -> None:
    session.enter(case)
    if case not in _cached:
        option = request.config.getoption
        chosen = not option("--no-compile"), option("--only-compiled")
        _cached[case] = contenders(case, session.device, *chosen)
    contender = next(c for c in _cached[case] if c.name == name)

    def pedantic(target: Any, **how: Any) -> list[float]:
        benchmark.pedantic(target, iterations=1, **how)
        return list(benchmark.stats.stats.data) if hasattr(benchmark, "stats") else benchmark.samples

    try:
        session.measure(contender, what, pedantic)
    except truth.Rejected as reason:
        if contender.ours:
            pytest.fail(f"{name}: {reason}")
        pytest.skip(f"{name}: {reason}")
