"""The CUDA kernels, run on the CPU by an emulation, must pass the contract's tests and some of their own."""

from __future__ import annotations

import pytest
from emulation import build

reason = build.unavailable()
if reason:
    pytest.skip(reason, allow_module_level=True)

from emulation import module  # noqa: E402
from test_contract import *  # noqa: E402, F403

from arl_fast.implementations import dispatch  # noqa: E402


@pytest.fixture
def implementation(monkeypatch: pytest.MonkeyPatch) -> str:
    """The emulated kernels serve everything in this test."""
    monkeypatch.setitem(dispatch.MODULES, "cuda_emulation", "emulation.module")
    monkeypatch.setitem(dispatch._loaded, "cuda_emulation", module)
    monkeypatch.setattr(dispatch, "override", "cuda_emulation")
    return "cuda_emulation"
