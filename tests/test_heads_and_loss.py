"""criterion(head(features), target) is head.loss(features, target), and both are right, for features of any
rank.
"""

from __future__ import annotations

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arl_fast import ARLLoss, BilinearHead, ConcatHead, GatedHead, SharedHead, SumHead

LINEAR = {
    "concat": lambda size, classes: ConcatHead({"a": size, "b": size}, classes),
    "split": lambda size, classes: ConcatHead({"a": size, "b": size}, classes, bias="split"),
    "sum": lambda size, classes: SumHead({"a": size, "b": size}, classes),
    "shared": lambda size, classes: SharedHead({"a": size, "b": size}, classes),
}
OTHER = {
    "gated": lambda size, classes: GatedHead({"a": size, "b": size}, classes),
    "bilinear": lambda size, classes: BilinearHead({"a": size, "b": size}, classes),
}


def features(shape, size):
    return {name: torch.randn(*shape, size, dtype=torch.float64, requires_grad=True) for name in "ab"}


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(list(LINEAR)),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    classes=st.integers(2, 5),
    options=st.fixed_dictionaries(
        {},
        optional={
            "rule": st.sampled_from(["share", "constant", "paper", "none"]),
            "gamma": st.sampled_from([0.5, 2.0]),
            "reduction": st.sampled_from(["mean", "sum", "none"]),
            "label_smoothing": st.just(0.1),
            "dependence": st.just("logit_l1"),
            "gain": st.sampled_from(["mean_one", "plain"]),
        },
    ),
    soft=st.booleans(),
    masked=st.booleans(),
    chunk=st.sampled_from([None, 2]),
)
def test_a_linear_head_and_its_loss_agree(kind, shape, classes, options, soft, masked, chunk):
    """Positions may be as many as classes: which dimension is which must not be guessed."""
    torch.manual_seed(0)
    head = LINEAR[kind](3, classes).double()
    z = features(shape, 3)
    target = torch.randint(classes, tuple(shape))
    if soft:
        target = torch.softmax(torch.randn(shape[0], classes, *shape[1:], dtype=torch.float64), 1)
    mask = torch.rand(shape[0], 2) > 0.4 if masked else None
    criterion = ARLLoss(**options)
    out = head(z, mask)
    assert out.fused.shape == (shape[0], classes, *shape[1:])
    apart = criterion(out, target, mask)
    stats = criterion.stats
    one, one_stats = head.loss(z, target, criterion, mask=mask, chunk=chunk)
    torch.testing.assert_close(one, apart)
    for got, want in zip(one_stats, stats, strict=True):
        torch.testing.assert_close(got, want)
    leaves = [*z.values(), *head.parameters()]
    upstream = torch.rand_like(apart)
    for got, want in zip(
        torch.autograd.grad(one, leaves, upstream), torch.autograd.grad(apart, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(got, want)
    truth = oracle.arl([out.fused, *out.unimodal.values()], target, mask=mask, **options)
    torch.testing.assert_close(apart, truth.loss)


@pytest.mark.parametrize("kind", [*LINEAR, *OTHER])
@pytest.mark.parametrize("shape", [(5,), (5, 4), (2, 3, 2)])
def test_classes_are_in_dimension_one(kind, shape):
    """Each position's logits are those of its own features."""
    head = (LINEAR | OTHER)[kind](3, 4).double()
    z = features(shape, 3)
    out = head(z)
    flat = head({name: x.reshape(-1, 3) for name, x in z.items()})
    for got, want in zip(
        [out.fused, *out.unimodal.values()], [flat.fused, *flat.unimodal.values()], strict=True
    ):
        assert got.shape == (shape[0], 4, *shape[1:])
        torch.testing.assert_close(got.movedim(1, -1).reshape(-1, 4), want)


def test_sequence_features_with_as_many_positions_as_classes():
    """Before, the loss took the positions for the classes and said nothing."""
    head, z = ConcatHead({"a": 3, "b": 3}, 4).double(), features((6, 4), 3)
    target = torch.randint(4, (6, 4))
    torch.testing.assert_close(ARLLoss()(head(z), target), head.loss(z, target)[0])


def test_features_of_different_batches_are_named():
    head = ConcatHead({"a": 3, "b": 3}, 4)
    z = {"a": torch.randn(5, 3), "b": torch.randn(6, 3)}
    with pytest.raises(
        ValueError, match=r"features\['b'\]: got shape \[6, 3\], expected \[5, 3\], .* first modality"
    ):
        head(z)
