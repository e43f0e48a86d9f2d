"""Which tests are slow, and how pytest-xdist's workers share tests and cores (tiers: CONTRIBUTING.md)."""

from __future__ import annotations

import os

import pytest
import torch

# Fixtures of these files start processes or compile: all their tests go to one worker, which does it once.
ONE_WORKER = {"test_cuda_binding.py", "test_cuda_build.py", "test_distributed.py"}
# What takes many seconds only when kernels are interpreted.
SLOW_INTERPRETED = ("test_gradcheck", "test_compiled_in_one_graph", "test_ops")


def pytest_configure(config: pytest.Config) -> None:
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:  # they share the cores; a test that needs several threads sets them itself
        threads = max(1, (os.cpu_count() or 1) // workers)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # of the processes that tests start
        torch.set_num_threads(threads)
    os.environ.pop("PYTEST_XDIST_WORKER", None)  # a pytest that a test starts is no worker


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    for item in items:
        if interpreting and item.name.startswith(SLOW_INTERPRETED):
            item.add_marker(pytest.mark.slow)
        if config.pluginmanager.hasplugin("xdist") and item.path.name in ONE_WORKER:
            item.add_marker(pytest.mark.xdist_group(item.path.name))
    # The longest first, so that no worker waits for them at the end. The order among the others stays.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
