"""Which private names of torch a new version has lost. Each has a fallback or fails here, by name, and not in
training.
"""

from __future__ import annotations

import pytest
import torch

import arl_fast
from arl_fast._core import _torch

NAMES = {
    "torch._C._are_functorch_transforms_active": lambda: torch._C._are_functorch_transforms_active,
    "torch._C._autograd._get_current_graph_task_keep_graph": lambda: (
        torch._C._autograd._get_current_graph_task_keep_graph
    ),
    "torch.Tensor.unsafe_split_with_sizes": lambda: torch.Tensor.unsafe_split_with_sizes,
    "torch.ops._c10d_functional.all_reduce": lambda: torch.ops._c10d_functional.all_reduce.default,
    "torch.ops._c10d_functional.all_gather_into_tensor": lambda: (
        torch.ops._c10d_functional.all_gather_into_tensor.default
    ),
    "torch.ops._c10d_functional.wait_tensor": lambda: torch.ops._c10d_functional.wait_tensor.default,
}
CUDA_NAMES = ["_cuda_getCurrentRawStream", "_cuda_getDevice"]


@pytest.mark.parametrize("name", NAMES)
def test_torch_has(name):
    if "c10d" in name and not torch.distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    assert callable(NAMES[name]()), f"this torch has no {name}: see arl_fast/_core/_torch.py"


@pytest.mark.parametrize("name", CUDA_NAMES)
def test_torch_with_cuda_has(name):
    if torch.version.cuda is None:
        pytest.skip("torch was built without CUDA")
    assert callable(getattr(torch._C, name, None)), f"this torch has no torch._C.{name}"


def test_the_compiler_reads_the_mark_of_a_constant():
    """It is what torch.compiler.assume_constant_result sets."""

    def marked():
        return 1

    assert torch.compiler.assume_constant_result(marked)._dynamo_marked_constant is True
    assert _torch.constant_for_compiler(lambda: 1)._dynamo_marked_constant is True


def test_a_transform_is_seen():
    with pytest.raises(RuntimeError, match=r"transform of torch\.func"):
        torch.func.grad(lambda z: arl_fast.modulate([z])[0][0].sum())(torch.randn(3))


def test_a_kept_graph_is_seen():
    seen = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            seen.append(_torch.graph_is_kept())
            return g

    y = Probe.apply(torch.ones(1, requires_grad=True)).sum()
    y.backward(retain_graph=True)
    y.backward()
    assert seen == [True, False]
