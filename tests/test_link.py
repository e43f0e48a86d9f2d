"""The link: gains reach the encoders of the same step, and nothing else, however the loop is written."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import arl_fast
from arl_fast import ARLLoss, ConcatHead, modulate


@pytest.fixture(autouse=True)
def every_implementation(implementation):
    """All of this file runs for each implementation."""


def setup(seed=0):
    torch.manual_seed(seed)
    encoders = torch.nn.ModuleDict({"a": torch.nn.Linear(5, 4), "b": torch.nn.Linear(5, 3)})
    head = ConcatHead({"a": 4, "b": 3}, 6)
    x, target = torch.randn(8, 5), torch.randint(0, 6, (8,))
    return encoders, head, x, target


def features(encoders, x):
    return {name: torch.tanh(layer(x)) for name, layer in encoders.items()}


def grads(*modules):
    return [p.grad.clone() for module in modules for p in module.parameters()]


def plain_grads(encoders, head, x, target, **options):
    """Gradients with all gains 1, and the gains that the rule gives here."""
    encoders, head = copy.deepcopy(encoders), copy.deepcopy(head)
    encoders.zero_grad(), head.zero_grad()
    criterion = ARLLoss(**options)
    with torch.no_grad():
        criterion(head(features(encoders, x)), target)
    ARLLoss(**{**options, "rule": "none"})(head(features(encoders, x)), target).backward()
    return grads(encoders), grads(head), criterion.stats.gains


def assert_scaled(encoders, head, plain, factor=1.0):
    encoder_plain, head_plain, gains = plain
    per_parameter = [gains[0], gains[0], gains[1], gains[1]]  # weight and bias of each encoder
    for got, want, gain in zip(grads(encoders), encoder_plain, per_parameter, strict=True):
        torch.testing.assert_close(got, factor * gain * want)
    for got, want in zip(grads(head), head_plain, strict=True):
        torch.testing.assert_close(got, factor * want)


def test_one_step():
    encoders, head, x, target = setup()
    plain = plain_grads(encoders, head, x, target)
    assert (plain[2] - 1).abs().min() > 0.1
    ARLLoss()(head(features(encoders, x)), target).backward()
    assert_scaled(encoders, head, plain)


def test_upstream_scale_does_not_touch_the_gain():
    """As a loss scale or an accumulation divisor would: the coefficients stay, gradients scale."""
    encoders, head, x, target = setup()
    plain = plain_grads(encoders, head, x, target)
    (ARLLoss()(head(features(encoders, x)), target) * 1024).backward()
    assert_scaled(encoders, head, plain, 1024)


def test_several_forwards_before_one_backward():
    encoders, head, x, target = setup()
    batches = [(x, target), (2 * x, target.flip(0)), (x - 1, target)]
    plains = [plain_grads(encoders, head, *batch) for batch in batches]
    losses = [ARLLoss()(head(features(encoders, x)), target) for x, target in batches]
    sum(losses).backward()
    for i, got in enumerate(grads(encoders)):
        torch.testing.assert_close(got, sum(p[0][i] * p[2][i // 2] for p in plains))
    for i, got in enumerate(grads(head)):
        torch.testing.assert_close(got, sum(p[1][i] for p in plains))


def test_accumulation_over_micro_batches():
    encoders, head, x, target = setup()
    halves = [(x[:4], target[:4]), (x[4:], target[4:])]
    plains = [plain_grads(encoders, head, *half) for half in halves]
    for half, y in halves:
        (ARLLoss()(head(features(encoders, half)), y) / 2).backward()
    for i, got in enumerate(grads(encoders)):
        torch.testing.assert_close(got, sum(p[0][i] * p[2][i // 2] for p in plains) / 2)


def test_retain_graph_doubles():
    encoders, head, x, target = setup()
    plain = plain_grads(encoders, head, x, target)
    loss = ARLLoss()(head(features(encoders, x)), target)
    loss.backward(retain_graph=True)
    loss.backward()
    assert_scaled(encoders, head, plain, 2)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_head_and_encoders(reentrant):
    encoders, head, x, target = setup()
    plain = plain_grads(encoders, head, x, target)
    x = x.requires_grad_()

    def forward(x):
        out = head(features(encoders, x))
        return out.fused, *out.unimodal.values(), out.link

    fused, a, b, link = checkpoint(forward, x, use_reentrant=reentrant)
    ARLLoss()((fused, {"a": a, "b": b}, link), target).backward()
    assert_scaled(encoders, head, plain)


def test_checkpointed_loss():
    encoders, head, x, target = setup()
    plain = plain_grads(encoders, head, x, target)
    criterion = ARLLoss()
    checkpoint(lambda x: criterion(head(features(encoders, x)), target), x, use_reentrant=False).backward()
    assert_scaled(encoders, head, plain)


def test_a_link_that_no_loss_uses_is_harmless():
    z, link = modulate([torch.randn(3, 2, requires_grad=True)])
    z[0].sum().backward()
    assert link.tolist() == [0]


def test_frozen_encoder_and_feature_without_use():
    encoders, head, x, target = setup()
    plain = plain_grads(encoders, head, x, target)
    for p in encoders["a"].parameters():
        p.requires_grad_(False)
    ARLLoss()(head(features(encoders, x)), target).backward()
    assert encoders["a"].weight.grad is None
    torch.testing.assert_close(encoders["b"].weight.grad, plain[2][1] * plain[0][2])


def test_all_encoders_frozen():
    encoders, head, x, target = setup()
    plain = plain_grads(encoders, head, x, target)
    encoders.requires_grad_(False)
    ARLLoss()(head(features(encoders, x)), target).backward()
    for got, want in zip(grads(head), plain[1], strict=True):
        torch.testing.assert_close(got, want)


def test_shared_encoder_gets_each_modalitys_gain():
    torch.manual_seed(0)
    encoder, head = torch.nn.Linear(5, 4, bias=False), ConcatHead([4, 4], 6)
    views, target = [torch.randn(8, 5), torch.randn(8, 5)], torch.randint(0, 6, (8,))
    criterion = ARLLoss()
    criterion(head([encoder(v) for v in views]), target).backward()
    total = encoder.weight.grad.clone()
    want = torch.zeros_like(total)
    for m in range(2):
        encoder.weight.grad = None
        z = [encoder(v) if i == m else encoder(v).detach() for i, v in enumerate(views)]
        ARLLoss(rule="none")(head(z), target).backward()
        want += criterion.stats.gains[m] * encoder.weight.grad
    torch.testing.assert_close(total, want)


def test_two_losses_on_one_link_add_their_excess():
    encoders, head, x, target = setup()
    plain = plain_grads(encoders, head, x, target)
    out = head(features(encoders, x))
    criterion = ARLLoss()
    (criterion(out, target) + criterion(out, target)).backward()
    gains = 2 * (plain[2] - 1) + 1
    torch.testing.assert_close(encoders["a"].weight.grad, 2 * gains[0] * plain[0][0])


def test_compiled_fullgraph():
    encoders, head, x, target = setup()
    plain = plain_grads(encoders, head, x, target)
    criterion = ARLLoss()

    def step(x, target):
        return criterion(head(features(encoders, x)), target)

    torch.compile(step, fullgraph=True)(x, target).backward()
    assert_scaled(encoders, head, plain)
    torch.testing.assert_close(criterion.stats.gains, plain[2])


def test_missing_link_raises_only_where_it_would_silently_do_nothing():
    logits, target = [torch.randn(4, 3, requires_grad=True) for _ in range(3)], torch.randint(0, 3, (4,))
    for rule in ("share", "paper", "constant", lambda s: s.coefficients):
        with pytest.raises(ValueError, match=r"link: got None.*modulate"):
            ARLLoss(rule=rule)((logits[0], logits[1:]), target)
    ARLLoss(rule="none")((logits[0], logits[1:]), target).backward()
    ARLLoss()((logits[0].detach(), [x.detach() for x in logits[1:]]), target)
    with torch.no_grad():
        ARLLoss()((logits[0], logits[1:]), target)


def test_swapped_modalities_raise():
    z, link = modulate({"a": torch.randn(4, 3, requires_grad=True), "b": torch.randn(4, 3)})
    with pytest.raises(
        ValueError, match=r"unimodal: got the modalities \['b', 'a'\], expected .*\['a', 'b'\]"
    ):
        ARLLoss()(
            arl_fast.BranchLogits(z["a"], {"b": z["b"], "a": z["a"]}, link), torch.zeros(4, dtype=torch.int64)
        )
