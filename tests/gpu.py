"""Fixtures that move tests to a GPU: tensors are made there, truth is computed on the CPU.

Importing this skips the module without a GPU. ARL_TEST_DEVICE=cpu runs what can run on a CPU, to see that the
tests are sound.
"""

from __future__ import annotations

import os

# read when cuBLAS starts; deterministic matrix products
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import oracle
import pytest
import torch

from arl_fast.implementations import dispatch

DEVICE = os.environ.get("ARL_TEST_DEVICE", "cuda")
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

gpu_only = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
TRUTH = oracle.arl


@pytest.fixture(params=["native", "triton", "reference"])
def implementation(request, monkeypatch):
    module, reason = dispatch.load(request.param, DEVICE)
    if module is None:
        pytest.skip(f"{request.param}: {reason}")
    monkeypatch.setattr(dispatch, "override", request.param)
    return request.param


@pytest.fixture
def poisoned():
    """As in conftest.py, but torch's own operations may lack a deterministic form on a GPU."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def _truth_on_cpu(logits, target, **options):
    def away(value):
        return value.cpu() if isinstance(value, torch.Tensor) else value

    with torch.device("cpu"):
        truth = TRUTH(
            [x.cpu() for x in logits], target.cpu(), **{name: away(value) for name, value in options.items()}
        )
    return oracle.Truth(truth.loss.to(DEVICE), [g.to(DEVICE) for g in truth.grads], truth.stats)


@pytest.fixture
def plain_device():
    """Tensors of this test are made where the test says."""


@pytest.fixture(autouse=True)
def on_device(monkeypatch, request):
    """Tensors are made on the GPU; float64 truth, with its loops over rows, is computed on the CPU."""
    monkeypatch.setattr(oracle, "arl", _truth_on_cpu)
    if "plain_device" in request.fixturenames:  # tests of what the library does with tensors of the CPU
        yield
        return
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)
