"""The binding of the CUDA launchers (csrc/cuda_ops.cpp), linked with their emulation, under the contract's
tests.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from emulation import build

reason = build.unavailable()
if reason:
    pytest.skip(reason, allow_module_level=True)

import test_contract as contract  # noqa: E402
from torch.utils.cpp_extension import include_paths, library_paths  # noqa: E402

from arl_fast._core import rules  # noqa: E402
from arl_fast._core.checks import check_class_range  # noqa: E402
from arl_fast.implementations import dispatch, native  # noqa: E402


@pytest.fixture(scope="session")
def binding(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    emulated = Path(build.library()._name)
    folder = tmp_path_factory.mktemp("binding")
    shutil.copy(emulated, folder / "libemulated.so")
    built = folder / "arl_cuda_binding.so"
    includes = [f"-I{path}" for path in [*include_paths(), sysconfig.get_paths()["include"]]]
    libraries = [f"-L{path}" for path in library_paths()] + [
        "-ltorch",
        "-ltorch_cpu",
        "-ltorch_python",
        "-lc10",
    ]
    sources = [
        str(build.CSRC / "cuda_ops.cpp"),
        str(build.CSRC / "eager/inputs.cpp"),
        str(build.HERE / "binding.cpp"),
    ]
    flags = [
        "-std=c++20",
        "-O1",
        "-fPIC",
        "-shared",
        "-w",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
    ]
    runtime = [f"-L{folder}", "-lemulated", f"-Wl,-rpath,{folder}"]
    command = [build.COMPILER, *flags, *includes, *sources, *runtime, *libraries, "-o", str(built)]
    done = subprocess.run(command, capture_output=True, text=True)
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert done.returncode == 0, "\n".join(errors)
    spec = importlib.util.spec_from_file_location("arl_cuda_binding", built)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def implementation(binding: ModuleType, monkeypatch: pytest.MonkeyPatch) -> str:
    """What implementations/native.py does on a GPU, on the default stream, over the emulated launchers."""
    ticket = torch.zeros(1, dtype=torch.int32)

    def forward(logits, targets, schedule, options, grad):
        if not targets.target.is_floating_point():
            check_class_range(targets.target, logits[0].shape[1], options.ignore_index)
        loss, packed, grads = binding.cuda_forward(
            logits, targets, schedule, options.for_kernels, grad, 0, ticket
        )
        assert int(ticket) == 0
        packed = packed if isinstance(options.rule, str) else rules.apply_rule(packed, schedule, options)
        return loss, packed, grads

    def scale(grads, upstream, factor, dtype, keep):
        return binding.cuda_scale(grads, upstream, factor, dtype, keep, 0)

    def modulate_backward(grads, link):
        given = [m for m, g in enumerate(grads) if g is not None]
        results = iter(binding.cuda_modulate_backward([grads[m] for m in given], link, given, 0))
        return [None if g is None else next(results) for g in grads]

    bound = SimpleNamespace(
        forward=forward,
        scale=scale,
        modulate_backward=modulate_backward,
        unavailable=lambda d: None,
        describe=str,
    )
    monkeypatch.setitem(dispatch.MODULES, "cuda_binding", "emulation.module")
    monkeypatch.setitem(dispatch._loaded, "cuda_binding", bound)
    monkeypatch.setattr(dispatch, "override", "cuda_binding")
    return "cuda_binding"


# What depends on the binding: layouts, dtypes, optional tensors, in-place scaling. The kernels' own cases are
# elsewhere.
test_against_truth = contract.test_against_truth
test_cross_entropy_options = contract.test_cross_entropy_options
test_ignored_rows_and_ignore_index = contract.test_ignored_rows_and_ignore_index
test_empty_batch = contract.test_empty_batch
test_dense = contract.test_dense
test_dense_channels_last_and_soft = contract.test_dense_channels_last_and_soft
test_strides = contract.test_strides
test_schedule_as_tensors = contract.test_schedule_as_tensors
test_warming = contract.test_warming
test_custom_rule = contract.test_custom_rule
test_backward_twice = contract.test_backward_twice
test_gains_on_encoders_and_one_on_the_head = contract.test_gains_on_encoders_and_one_on_the_head
test_modulate_dtypes = contract.test_modulate_dtypes


def test_more_tensors_than_one_launch_takes(implementation, binding):
    grads = [torch.randn(m + 1) for m in range(35)]
    link = torch.randn(35)
    for got, g, value in zip(
        binding.cuda_modulate_backward(grads, link, list(range(35)), 0), grads, link, strict=True
    ):
        torch.testing.assert_close(got, g * (1 + value))


def test_a_dtype_that_no_kernel_takes_is_named(binding):
    with pytest.raises(
        TypeError, match=r"arl_fast: got dtype Int, expected float64, float32, bfloat16 or float16"
    ):
        binding.cuda_scale([torch.ones(2, 2)], torch.ones(()), None, torch.int32, True, 0)


def test_more_branches_than_a_launch_holds_are_refused(binding):
    """The Python side gives these to the reference; the binding must not write past its arrays if it is asked
    all the same.
    """
    grads = [torch.ones(2, 2) for _ in range(17)]
    with pytest.raises(RuntimeError, match=r"arl_fast: got 17 branches, expected at most 16"):
        binding.cuda_scale(grads, torch.ones(()), None, torch.float32, True, 0)


def test_native_leaves_more_branches_to_the_reference(monkeypatch):
    """Forward and backward alike: what the reference has computed, the reference scales."""
    monkeypatch.setattr(native, "MAX_BRANCHES", {"cpu": 2})
    monkeypatch.setattr(native, "_C", None)  # must not be reached
    grads = [torch.ones(2, 2) for _ in range(3)]
    for g in native.scale(grads, torch.tensor(0.5), None, torch.float32, False):
        assert g.eq(0.5).all()
