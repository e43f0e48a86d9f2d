"""Wrong wirings, which would leave the encoders without their gains in silence, raise, warn or are found by ``check``."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import arl_fast
from arl_fast import ARLLoss, BranchLogits, apply_gains, arl_loss, modulate

GAINS = torch.tensor([1.25, 1.75])


@pytest.fixture(autouse=True)
def every_implementation(implementation):
    """All of this file runs for each implementation."""


def four_features():
    """Two features of each of two modalities, which all reach their modality's logits."""
    torch.manual_seed(0)
    return [torch.randn(8, 5, requires_grad=True) for _ in range(4)], torch.randint(0, 5, (8,))


def grads_of(loss, tensors):
    return torch.autograd.grad(loss, tensors, retain_graph=True)


@pytest.mark.parametrize("form", ["dict", "list"])
def test_all_features_of_a_modality_get_its_gain(form):
    """{"audio": [a1, a2], "visual": [v1, v2]}: lists come back, the link has one entry per modality."""
    z, target = four_features()
    nested = {"audio": z[:2], "visual": tuple(z[2:])} if form == "dict" else [z[:2], z[2:]]
    (audio, visual), link = (lambda f, k: (f.values() if form == "dict" else f, k))(*modulate(nested))
    assert isinstance(audio, list)
    assert link.shape == (2,)
    unimodal = {"audio": audio[0] + audio[1], "visual": visual[0] * visual[1]}
    fused = unimodal["audio"] + unimodal["visual"]
    plain = grads_of(arl_loss(fused, unimodal, target, rule="none")[0], z)
    loss, stats = arl_loss(fused, unimodal, target, link)
    assert (stats.gains - 1).abs().min() > 0.1
    for i, (got, want) in enumerate(zip(grads_of(loss, z), plain, strict=True)):
        torch.testing.assert_close(got, want * stats.gains[i // 2])


def test_one_modality_with_one_feature_and_one_with_a_list():
    z, _ = four_features()
    features, link = modulate({"audio": z[0], "visual": z[1:]})
    assert features["audio"].shape == (8, 5)
    assert [len(features["visual"]), *link.shape] == [3, 2]
    assert link.modalities == ("audio", "visual")
    loss = apply_gains(sum(x.sum() for x in (features["audio"], *features["visual"])), link, GAINS)
    assert [float(g.mean()) for g in grads_of(loss, z)] == [1.25, 1.75, 1.75, 1.75]


def test_grouped_features_compile():
    z, target = four_features()

    def step(a1, a2, v1, v2):
        (a, v), link = modulate([[a1, a2], [v1, v2]])
        unimodal = [a[0] + a[1], v[0] * v[1]]
        return arl_loss(unimodal[0] + unimodal[1], unimodal, target, link)[0]

    eager = grads_of(step(*z), z)
    for got, want in zip(grads_of(torch.compile(step, fullgraph=True, backend="aot_eager")(*z), z), eager, strict=True):
        torch.testing.assert_close(got, want)


def test_a_flat_list_of_several_features_per_modality_raises():
    """Its link is a multiple of M, as one of DataParallel's is; a2 would get the visual gain and v1 the audio one."""
    z, target = four_features()
    (a1, a2, v1, v2), link = modulate(z)
    unimodal = [a1 + a2, v1 + v2]
    message = r"link: got shape \[4\], expected \[2\].* {'audio': \[a1, a2\], 'visual': \[v1, v2\]}.*DataParallel"
    with pytest.raises(ValueError, match=message):
        arl_loss(unimodal[0] + unimodal[1], unimodal, target, link)


def test_a_gathered_link_of_replicas_with_flat_lists_raises():
    """Two replicas of a model that gives four features in one list, or one replica's link twice: no entries per modality."""
    z, target = four_features()
    parts = [modulate([x[rows] for x in z]) for rows in (slice(4), slice(4, 8))]
    a, v = (torch.cat([f[i] + f[i + 1] for f, _ in parts]) for i in (0, 2))
    gathered = torch.cat([link for _, link in parts])
    with pytest.raises(ValueError, match=r"link: got shape \[8\], expected \[2\]"):
        arl_loss(a + v, [a, v], target, gathered)
    (a, v), link = modulate(z[:2])
    with pytest.raises(ValueError, match=r"link: got shape \[4\], expected \[2\]"):
        arl_loss(a + v, [a, v], target, torch.cat([link, link]))


class Gather(torch.autograd.Function):
    """What DataParallel does with the outputs of its replicas, as a node of its own in the graph."""

    @staticmethod
    def forward(ctx, *parts):
        ctx.sizes = [len(part) for part in parts]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        return grad.split(ctx.sizes)


def test_a_link_that_a_node_of_its_own_has_gathered():
    """With several features per modality in each replica."""
    z, target = four_features()
    features = [modulate({"a": [x[rows] for x in z[:2]], "v": [x[rows] for x in z[2:]]}) for rows in (slice(3), slice(3, 8))]
    a = Gather.apply(*(f["a"][0] + f["a"][1] for f, _ in features))
    v = Gather.apply(*(f["v"][0] * f["v"][1] for f, _ in features))
    link = Gather.apply(*(link for _, link in features))
    plain = grads_of(arl_loss(a + v, [a, v], target, rule="none")[0], z)
    loss, stats = arl_loss(a + v, [a, v], target, link)
    for i, (got, want) in enumerate(zip(grads_of(loss, z), plain, strict=True)):
        torch.testing.assert_close(got, want * stats.gains[i // 2])
