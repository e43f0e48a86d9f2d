"""The binding of the CUDA launchers (csrc/cuda_ops.cpp), linked with their emulation, under the contract's
tests.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import pytest
import torch
from emulation import build
from torch.utils._python_dispatch import TorchDispatchMode

reason = build.unavailable()
if reason:
    pytest.skip(reason, allow_module_level=True)

import test_contract as contract  # noqa: E402
import test_multilabel as multilabel  # noqa: E402
import test_native as eager  # noqa: E402
import test_native_labels as eager_labels  # noqa: E402

from arl_fast import BranchLogits, arl_loss, modulate  # noqa: E402
from arl_fast._core import rules  # noqa: E402
from arl_fast._core.branches import Targets  # noqa: E402
from arl_fast._core.checks import check_class_range  # noqa: E402
from arl_fast._core.options import Options, Schedule  # noqa: E402
from arl_fast.implementations import dispatch, native, ops  # noqa: E402


@pytest.fixture(scope="session")
def binding() -> ModuleType:
    return build.binding()


@pytest.fixture
def implementation(binding: ModuleType, monkeypatch: pytest.MonkeyPatch) -> str:
    """What implementations/native.py does on a GPU, on the default stream, over the emulated launchers."""

    def forward(logits, targets, schedule, options, grad):
        if not targets.target.is_floating_point():
            check_class_range(targets.target, logits[0].shape[1], options.ignore_index)
        loss, packed, grads = binding.cuda_forward(logits, targets, schedule, options.for_kernels, grad)
        packed = packed if isinstance(options.rule, str) else rules.apply_rule(packed, schedule, options)
        return loss, packed, grads

    def modulate_backward(grads, link):
        return ops.for_present(
            grads, lambda given, modalities: binding.cuda_modulate_backward(given, modalities, link)
        )

    bound = SimpleNamespace(
        forward=forward,
        scale=binding.cuda_scale,
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
test_labels_against_truth = multilabel.test_against_truth


def test_more_tensors_than_one_launch_takes(binding):
    grads = [torch.randn(m + 1) for m in range(35)]
    link = torch.randn(35)
    got = binding.cuda_modulate_backward(grads, list(range(35)), link)
    for modulated, g, value in zip(got, grads, link, strict=True):
        torch.testing.assert_close(modulated, g * (1 + value))


def test_results_are_contiguous(binding):
    """As the registered ops promise the compiler, whatever the strides of the gradients."""
    grads = [torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.randn(4, 3).t()]
    for modulated, g in zip(binding.cuda_modulate_backward(grads, [0, 1], torch.ones(2)), grads, strict=True):
        assert modulated.is_contiguous()
        assert torch.equal(modulated, 2 * g)


def test_targets_of_another_task_are_named(binding):
    logits, target = [torch.randn(6, 5) for _ in range(3)], torch.rand(6, 5)
    labels, schedule = Options(task="multilabel"), Schedule(1.0, 8.0)
    with pytest.raises(ValueError, match="pos_weight: expected None without labels"):
        binding.cuda_forward(logits, Targets(target, pos_weight=torch.ones(5)), schedule, Options(), True)
    with pytest.raises(TypeError, match="target: expected labels of floating point"):
        binding.cuda_forward(logits, Targets(target.long()), schedule, labels, True)


class Recorder(TorchDispatchMode):
    """The names of torch's operations, in order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_a_schedule_of_tensors_takes_no_operation(binding, dtype):
    """Neither a copy nor a launch: the kernels read gamma, T and the warm-up's counter where they are."""
    logits, target = [torch.randn(6, 5, dtype=dtype) for _ in range(3)], torch.randint(0, 5, (6,))
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    schedule = Schedule(torch.rand(2, dtype=compute), torch.tensor(8.0, dtype=compute), 3, torch.tensor(2))
    with Recorder() as recorder:
        binding.cuda_forward(logits, Targets(target), schedule, Options(), True)
    assert set(recorder.names) == {"aten::empty.memory_format"}


def test_results_have_memory_of_their_own(binding):
    """The compiler frees and reuses the results of an op one by one."""
    logits, target = [torch.randn(6, 5) for _ in range(3)], torch.randint(0, 5, (6,))
    loss, packed, grads = binding.cuda_forward(logits, Targets(target), Schedule(1.0, 8.0), Options(), True)
    scaled = binding.cuda_scale(grads, torch.tensor(2.0), None, torch.float32, True)
    results = [loss, packed, *grads, *scaled]
    assert len({x.untyped_storage().data_ptr() for x in results}) == len(results)
    assert all(x.storage_offset() == 0 for x in results)


def test_a_dtype_that_no_kernel_takes_is_named(binding):
    with pytest.raises(
        TypeError, match=r"arl_fast: got dtype Int, expected float64, float32, bfloat16 or float16"
    ):
        binding.cuda_scale([torch.ones(2, 2)], torch.ones(()), None, torch.int32, True)


def test_more_branches_than_a_launch_holds_are_refused(binding):
    """The Python side gives these to the reference; the binding refuses to write past its arrays."""
    grads = [torch.ones(2, 2) for _ in range(17)]
    with pytest.raises(RuntimeError, match=r"arl_fast: got 17 branches, expected at most 16"):
        binding.cuda_scale(grads, torch.ones(()), None, torch.float32, True)


def test_native_leaves_more_branches_to_the_reference(monkeypatch):
    """Forward and backward alike: what the reference has computed, the reference scales."""
    monkeypatch.setattr(native, "MAX_BRANCHES", {"cpu": 2})
    monkeypatch.setattr(native, "_C", None)  # must not be reached
    grads = [torch.ones(2, 2) for _ in range(3)]
    for g in native.scale(grads, torch.tensor(0.5), None, torch.float32, False):
        assert g.eq(0.5).all()


# ---- the eager step in one call, as on a GPU ---------------------------------------------------------------


@pytest.fixture
def fast_calls(binding, implementation, monkeypatch):
    """The node of csrc/eager over the emulated launchers; whether it has served each call of the loss."""
    calls = []

    def counted(name):
        def call(*arguments):
            result = getattr(binding, name)(*arguments)
            calls.append(result is not None)
            return result

        return call

    steps = SimpleNamespace(
        fast_loss=counted("fast_loss"),
        fast_criterion=counted("fast_criterion"),
        fast_modulate=binding.fast_modulate,
        fast_linear_loss=lambda *_: None,
        fast_unpack=lambda _: None,
    )
    monkeypatch.setattr(dispatch, "native_steps", lambda: steps)
    return calls


test_fast_step_equals_the_general_one = eager.test_fast_step_equals_the_general_one
test_fast_labels_equal_the_general_step = eager_labels.test_fast_step_equals_the_general_one
test_retained_graph_and_upstream = eager.test_retained_graph_and_upstream
test_gradients_of_some_branches_only = eager.test_gradients_of_some_branches_only
test_saved_tensor_hooks_and_checkpoint = eager.test_saved_tensor_hooks_and_checkpoint
test_modulate_node_equals_the_function = eager.test_modulate_node_equals_the_function
test_modulate_shares_memory_and_version = eager.test_modulate_shares_memory_and_version
test_modulate_then_loss_scales_the_encoders = eager.test_modulate_then_loss_scales_the_encoders


@pytest.fixture(autouse=True)
def only_fast(request):
    """The tests of the eager step that are taken over here use the node."""
    if getattr(request.function, "__module__", "") == "test_native":
        request.getfixturevalue("fast_calls")


def test_allocations_of_a_step(fast_calls):
    """One for the M+1 gradients, one for statistics and workspace, one for the loss; backward takes none."""
    logits, target = [torch.randn(6, 5, requires_grad=True) for _ in range(3)], torch.randint(0, 5, (6,))
    link = torch.zeros(2, requires_grad=True)
    schedule = Schedule(torch.tensor([1.0, 2.0]), torch.tensor(8.0), 3, torch.tensor(1))
    arguments = Options(), BranchLogits(logits[0], logits[1:], link), Targets(target), schedule
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss, _ = dispatch.native_steps().fast_loss(*arguments)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["aten::empty"] == 3
    assert set(counts) <= {"aten::empty", "arl_fast::loss", "[memory]"}
    upstream = torch.ones(())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        grads = torch.autograd.grad(loss, [*logits, link], upstream)
    assert "aten::empty" not in {event.key for event in profile.key_averages()}
    storages = {g.untyped_storage().data_ptr() for g in grads[:3]}
    assert len(storages) == 1
    assert len({g.data_ptr() for g in grads}) == 4


def test_link_keeps_its_value_over_several_backwards(fast_calls):
    """What a leaf link accumulates in place is not what the next backward hands out."""
    logits, target = [torch.randn(6, 5, requires_grad=True) for _ in range(3)], torch.randint(0, 5, (6,))
    link = torch.zeros(2, requires_grad=True)
    loss, stats = arl_loss(logits[0], logits[1:], target, link)
    once = stats.gains - 1
    for _ in range(3):
        loss.backward(retain_graph=True)
    torch.testing.assert_close(link.grad, 3 * once)


def test_the_zero_link_is_zero_again(fast_calls):
    """A write into a link does not reach the next one."""
    for _ in range(3):
        _, link = modulate([torch.randn(2, 3) for _ in range(2)])
        assert link.eq(0).all()
        link.add_(1)
