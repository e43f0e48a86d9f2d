"""pytest options of the microbenchmarks, and a stand-in for pytest-benchmark where it is not installed."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

try:
    import pytest_benchmark  # noqa: F401

    HAVE_PLUGIN = True
except ImportError:
    HAVE_PLUGIN = False


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("arl_fast")
    group.addoption("--rows", default=None, help="file to which rows are appended; none: measure and forget")
    group.addoption("--suites", default="paper", help="comma-separated suites of benchmarks/cases.py")
    group.addoption("--device", default="cpu", help="cpu or cuda")
    group.addoption("--threads", type=int, default=1, help="threads of torch on a CPU")
    group.addoption(
        "--rotations", type=int, default=5, help="times that every contender is measured, in rotated order"
    )
    group.addoption("--sample", type=float, default=2e-3, help="seconds of a sample of several calls")
    group.addoption("--rounds", type=int, default=10, help="samples per rotation")
    group.addoption(
        "--no-compile", action="store_true", help="leave out what torch.compile takes half a minute for"
    )
    group.addoption("--only-compiled", action="store_true", help="measure nothing else, but for the unit")


if not HAVE_PLUGIN:

    def pytest_configure(config: pytest.Config) -> None:
        config.addinivalue_line("markers", "benchmark: options of pytest-benchmark")

    class _Pedantic:
        """The one method of pytest-benchmark's fixture that is used."""

        samples: list[float]
        timer: Callable[[], float]

        def pedantic(
            self, target: Callable, setup: Callable, rounds: int, warmup_rounds: int, iterations: int = 1
        ) -> None:
            self.samples = []
            for i in range(warmup_rounds + rounds):
                args, kwargs = setup()
                begin = self.timer()
                target(*args, **kwargs)
                if i >= warmup_rounds:
                    self.samples.append(self.timer() - begin)

    @pytest.fixture
    def benchmark(request: pytest.FixtureRequest) -> _Pedantic:
        found = _Pedantic()
        marker = request.node.get_closest_marker("benchmark")
        found.timer = marker.kwargs["timer"] if marker else time.perf_counter
        return found
