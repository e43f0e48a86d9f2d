"""Kernels of task "multilabel" against the reference in float64, for the tests of each implementation."""

from __future__ import annotations

import math

import torch

from arl_fast._core import dtypes
from arl_fast._core.branches import Targets
from arl_fast._core.options import Schedule, make_options
from arl_fast.implementations import reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float64: 1e-14, torch.float32: 2e-7, torch.bfloat16: 3e-3, torch.float16: 2e-7}
SCHEDULE = Schedule(1.5, 8.0)


def inputs(shape=(33, 7), dtype=torch.float32, branches=3):
    """Logits, and labels of which some are soft and some not known."""
    logits = [(3 * torch.randn(shape)).to(dtype) for _ in range(branches)]
    target = torch.randint(0, 2, shape).to(dtypes.compute_dtype(dtype))
    target = torch.where(torch.rand(shape) < 0.2, torch.rand(shape), target)
    return logits, torch.where(torch.rand(shape) < 0.2, math.nan, target)


def double(values):
    return [v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in values]


def compare(implementation, logits, targets, grad=True, schedule=SCHEDULE, **options):
    """The kernel next to the reference in float64, which test_multilabel.py checks against the formulas."""
    options = make_options(task="multilabel", **options)
    loss, packed, grads = implementation.forward(logits, targets, schedule, options, grad)
    want = reference.forward(double(logits), Targets(*double(targets)), schedule, options, grad)
    dtype = logits[0].dtype
    exact = 1e-13 if dtype == torch.float64 else 2e-6
    assert loss.dtype == packed.dtype == dtypes.compute_dtype(dtype)
    for got, expected in zip((loss, packed), want[:2], strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=exact, atol=exact, equal_nan=True)
    for got, expected in zip(grads, want[2], strict=True):
        assert got.dtype == dtypes.grad_dtype(dtype)
        assert (got.double() - expected).norm() <= ROUNDING[dtype] * expected.norm()
    return loss, packed, grads
