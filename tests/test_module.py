"""ARLLoss as a module, the presets, dispatch, and what importing costs."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch

import arl_fast
from arl_fast import ARLLoss, BranchLogits, BranchStats, ConcatHead
from arl_fast._core.options import Schedule
from arl_fast.implementations import dispatch, reference


def example():
    head = ConcatHead({"a": 4, "b": 3}, 5)
    z = {"a": torch.randn(6, 4, requires_grad=True), "b": torch.randn(6, 3, requires_grad=True)}
    return head, z, torch.randint(0, 5, (6,))


def test_stats_of_the_last_call():
    head, z, target = example()
    criterion = ARLLoss()
    assert criterion.stats is None
    criterion(head(z), target)
    assert isinstance(criterion.stats, BranchStats)
    assert criterion.stats.loss.shape == (3,)
    assert criterion.stats.gains.shape == (2,)
    assert not any(value.requires_grad for value in criterion.stats)


def test_outputs_of_every_form_give_the_same():
    head, z, target = example()
    out = head(z)
    forms = [
        out,
        tuple(out),
        (out.fused, list(out.unimodal.values()), out.link),
        {"fused": out.fused, **out.unimodal, "link": out.link},
    ]
    losses = [ARLLoss()(form, target) for form in forms]
    assert all(torch.equal(loss, losses[0]) for loss in losses)


def test_warmup_lives_in_the_state_dict():
    """gamma = 1 and gain = 1 during the warm-up; evaluation does not count; a restart goes on."""
    head, z, target = example()
    criterion = ARLLoss(gamma=3.0, warmup=2)

    def step(criterion):
        loss = criterion(head(z), target)
        return [float(loss.detach()), *criterion.stats.gains.tolist()]

    unwarmed = ARLLoss(gamma=3.0)
    warm = [float(ARLLoss(gamma=1.0)(head(z), target).detach()), 1.0, 1.0]
    cold = [float(unwarmed(head(z), target).detach()), *unwarmed.stats.gains.tolist()]
    assert step(criterion) == pytest.approx(warm)
    criterion.eval()
    step(criterion)
    criterion.train()
    resumed = ARLLoss(gamma=3.0, warmup=2)
    resumed.load_state_dict(pickle.loads(pickle.dumps(criterion.state_dict())))
    for c in (criterion, resumed, copy.deepcopy(resumed)):
        assert int(c.steps) == 1
        assert step(c) == pytest.approx(warm)
        assert step(c) == pytest.approx(cold)
        assert step(c) == pytest.approx(cold)
    assert warm[0] != pytest.approx(cold[0])


def test_pickle_and_deepcopy_in_use():
    head, z, target = example()
    criterion = ARLLoss(weight=torch.rand(5), label_smoothing=0.1)
    loss = criterion(head(z), target)
    for other in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert torch.equal(other(head(z), target), loss)
    assert "label_smoothing=0.1" in repr(criterion)


def test_presets_name_the_published_settings():
    for name, temperature in {"crema-d": 8, "ave": 4, "ks": 4, "mosi": 4, "ucf101": 4}.items():
        paper = ARLLoss.paper(name)
        assert (paper.gamma, paper.temperature) == (4, temperature)
        assert paper.options.rule == ("share" if name == "mosi" else "paper")
        assert paper.options.dependence == "confidence"
    for name, (gamma, temperature) in {"crema-d": (4, 8), "ave": (5, 4), "ks": (3, 4)}.items():
        release = ARLLoss.release(name, warmup=10)
        assert (release.gamma, release.temperature, release.warmup) == (gamma, temperature, 10)
        assert (release.options.rule, release.options.dependence, release.options.entropy_floor) == (
            "constant",
            "logit_l1",
            0.3,
        )
    assert ARLLoss.paper("ks", gamma=1.0).gamma == 1


def test_release_preset_is_a_constant_one_and_a_half():
    head, z, target = example()
    criterion = ARLLoss.release("crema-d")
    criterion(head(z), target)
    assert criterion.stats.gains.tolist() == [1.5, 1.5]


def test_reference_is_selectable():
    head, z, target = example()
    out = head(z)
    loss, stats = arl_fast.reference.arl_loss(*out[:2], target, out.link, temperature=4.0)
    want, want_stats = arl_fast.arl_loss(*out[:2], target, out.link, temperature=4.0)
    torch.testing.assert_close(loss, want)
    for got, expected in zip(stats, want_stats, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("index", [torch.int64, torch.int32])
def test_logits_alone_in_evaluation_are_the_fused_ones(dtype, index):
    """Whatever the loss takes in training; the same errors as well."""
    x, target = torch.randn(6, 4, dtype=dtype), torch.randint(4, (6,), dtype=index)
    criterion = ARLLoss(gamma=0.0, rule="none", weight=torch.rand(4), label_smoothing=0.1).eval()
    assert torch.equal(criterion(x, target), criterion((x, [x]), target))
    with pytest.raises(ValueError, match="target: got probabilities that sum to 3"):
        criterion(x, torch.full((6, 4), 0.75))


def test_plain_cross_entropy_goes_to_torch():
    x = torch.randn(2, 3)
    options = ARLLoss(rule="none").options
    assert dispatch.for_loss(x, options, Schedule(0.0, 8.0)) is reference


def run_python(*arguments, **environment):
    result = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env={**os.environ, **environment}
    )
    return result.returncode, result.stdout + result.stderr


def test_command_line_names_implementation_and_reason():
    code, text = run_python("-m", "arl_fast")
    assert code == 0
    assert "cpu: " in text
    assert "cuda: " in text
    code, text = run_python("-m", "arl_fast", ARL_FAST_IMPL="reference")
    assert "cpu: reference (ARL_FAST_IMPL=reference asks for it" in text
    code, text = run_python("-m", "arl_fast", ARL_FAST_IMPL="fastest")
    assert code != 0
    assert "ARL_FAST_IMPL: got 'fastest', expected one of reference, native, triton" in text


def test_import_is_light():
    """Nothing optional is imported before it is needed."""
    heavy = "triton numpy matplotlib transformers lightning torch._inductor torch._dynamo"
    script = "import torch, sys; before = set(sys.modules); import arl_fast; "
    script += f"print(sorted(({set(heavy.split())} & set(sys.modules)) - before))"
    code, text = run_python("-c", script)
    assert code == 0
    assert text.strip() == "[]"


def test_branch_logits_is_a_named_tuple():
    x = torch.randn(2, 3)
    assert BranchLogits(x, [x]).link is None
    assert BranchLogits._fields == ("fused", "unimodal", "link")
