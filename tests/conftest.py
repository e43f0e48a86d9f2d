"""Fixtures: a test that takes ``implementation`` runs once for each that can serve a CPU tensor here.

The Triton kernels run on the CPU under Triton's interpreter only: TRITON_INTERPRET=1 pytest -m contract.
"""

from __future__ import annotations

import os

import pytest
import torch

from arl_fast.implementations import dispatch
from arl_fast.implementations.sharded import Sharded

pytest_plugins = ["tiers"]

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
# "sharded" holds all classes in one process here; it serves the tests that are marked `contract`, and no
# others
CONTRACT = ["triton"] if INTERPRETING else ["reference", "native", "sharded"]

if INTERPRETING:
    import triton_interpreter

    triton_interpreter.mend()


@pytest.fixture(params=CONTRACT)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of the implementation that serves everything in this test."""
    if request.param == "sharded":
        monkeypatch.setattr(dispatch, "override", Sharded())
        return request.param
    module, reason = dispatch.load(request.param, "cpu")
    if module is None:
        pytest.skip(f"{request.param}: {reason}")
    monkeypatch.setattr(dispatch, "override", request.param)
    return request.param


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [
        item for item in items if _implementation(item) != "sharded" or item.get_closest_marker("contract")
    ]


def _implementation(item: pytest.Item) -> str | None:
    callspec = getattr(item, "callspec", None)
    return None if callspec is None else callspec.params.get("implementation")


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
    """``count_served(name)``: a list that tells of each call of a native step in one call, as "fast_loss",
    whether it served.
    """
    from arl_fast.implementations import native

    def count(name):
        calls = []
        original = getattr(native, name)

        def counted(*args):
            result = original(*args)
            calls.append(result is not None)
            return result

        monkeypatch.setattr(native, name, counted)
        return calls

    return count
