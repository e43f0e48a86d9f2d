"""Fixtures: every test that takes ``implementation`` runs once for each implementation that can serve a CPU tensor here.

The Triton kernels run on the CPU under Triton's interpreter only: TRITON_INTERPRET=1 pytest -m contract.
"""

from __future__ import annotations

import os

import pytest
import torch

from arl_fast import dispatch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
CONTRACT = ["triton"] if INTERPRETING else ["reference", "native"]

if INTERPRETING:
    import triton_interpreter

    triton_interpreter.mend()


# Fixtures of these files start processes or compile: all their tests go to one worker, which does it once.
ONE_WORKER = {"test_cuda_binding.py", "test_cuda_build.py", "test_distributed.py"}
# What takes many seconds only when kernels are interpreted.
SLOW_INTERPRETED = ("test_gradcheck", "test_compiled_in_one_graph", "test_ops")


def pytest_configure(config: pytest.Config) -> None:
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:  # the workers share the cores; a test that needs several threads sets them itself
        threads = max(1, (os.cpu_count() or 1) // workers)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # of the processes that tests start
        torch.set_num_threads(threads)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if INTERPRETING and item.name.startswith(SLOW_INTERPRETED):
            item.add_marker(pytest.mark.slow)
        if config.pluginmanager.hasplugin("xdist") and item.path.name in ONE_WORKER:
            item.add_marker(pytest.mark.xdist_group(item.path.name))
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)  # the longest first: no worker waits for them at the end


@pytest.fixture(params=CONTRACT)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of the implementation that serves everything in this test."""
    module, reason = dispatch.load(request.param, "cpu")
    if module is None:
        pytest.skip(f"{request.param}: {reason}")
    monkeypatch.setattr(dispatch, "override", request.param)
    return request.param


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """torch.empty returns NaN: an output element that no kernel writes shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def count_served(monkeypatch):
    """``count_served(name)``: a list that tells of each call of a native step in one call, as "fast_loss", whether it served."""
    from arl_fast.kernels import native

    def count(name):
        calls = []

        def counted(*args):
            result = getattr(native._C, name)(*args)
            calls.append(result is not None)
            return result

        monkeypatch.setattr(native, name, counted)
        return calls

    return count
