"""Each of these small defects in an implementation must make the contract's check fail."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import test_contract as contract
import torch

from arl_fast._autograd import link
from arl_fast._core import stats
from arl_fast.implementations import dispatch, reference


def poke(packed, field, change):
    """The packed vector with one statistic changed."""
    pieces = list(torch.split(packed.clone(), stats.packed_sizes(stats.modalities_of(packed))))
    index = stats.BranchStats._fields.index(field)
    pieces[index] = change(pieces[index])
    return torch.cat(pieces)


DEFECTS = {
    "no gradient": lambda loss, packed, grads: (loss, packed, [torch.zeros_like(g) for g in grads]),
    "gradient 1% too large": lambda loss, packed, grads: (loss, packed, [1.01 * g for g in grads]),
    "one element of the gradient missing": lambda loss, packed, grads: (
        loss,
        packed,
        [g.index_fill(0, torch.tensor(2), 0) for g in grads],
    ),
    "unimodal gradients swapped": lambda loss, packed, grads: (loss, packed, [grads[0], grads[2], grads[1]]),
    "unimodal gradients without gamma": lambda loss, packed, grads: (
        loss,
        packed,
        [grads[0], *(g / 0.7 for g in grads[1:])],
    ),
    "loss without a branch": lambda loss, packed, grads: (loss - 0.7 * packed[2], packed, grads),
    "accuracy off by one row": lambda loss, packed, grads: (
        loss,
        poke(packed, "accuracy", lambda v: v + 1 / 6),
        grads,
    ),
    "entropy in bits": lambda loss, packed, grads: (
        loss,
        poke(packed, "entropy", lambda v: v / 0.6931),
        grads,
    ),
    "dependence summed": lambda loss, packed, grads: (
        loss,
        poke(packed, "dependence", lambda v: v * 7),
        grads,
    ),
    "variance not inverted": lambda loss, packed, grads: (
        loss,
        poke(packed, "inverse_variance", lambda v: v.flip(0)),
        grads,
    ),
    "coefficients uniform": lambda loss, packed, grads: (
        loss,
        poke(packed, "coefficients", lambda v: v * 0 + 0.5),
        grads,
    ),
    "gains without the residual": lambda loss, packed, grads: (
        loss,
        poke(packed, "gains", lambda v: v - 1),
        grads,
    ),
    "ignored rows counted": lambda loss, packed, grads: (loss, poke(packed, "count", lambda v: v + 1), grads),
}


@pytest.fixture
def batch():
    logits, target = contract.make()
    logits[1] *= 3
    target[1] = -100
    return logits, target


def install(monkeypatch, **functions):
    """The reference with some of its functions replaced, as the implementation that serves everything."""
    original = {name: getattr(reference, name) for name in ("forward", "scale", "modulate_backward")}
    monkeypatch.setitem(dispatch._loaded, "reference", SimpleNamespace(**(original | functions)))
    monkeypatch.setattr(dispatch, "override", "reference")


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_in_forward_is_noticed(monkeypatch, batch, name):
    contract.check(*batch, gamma=0.7)
    install(monkeypatch, forward=lambda *args: DEFECTS[name](*reference.forward(*args)))
    with pytest.raises(AssertionError):
        contract.check(*batch, gamma=0.7)


def test_a_defect_in_backward_is_noticed(monkeypatch, batch):
    install(monkeypatch, scale=lambda grads, upstream, factor, dtype, keep: grads)
    with pytest.raises(AssertionError):
        contract.check(*batch, upstream=torch.tensor(0.7))


@pytest.mark.parametrize(
    "defect", [lambda grads, link: grads, lambda grads, link: [g * link[m] for m, g in enumerate(grads)]]
)
def test_a_gain_that_does_not_arrive_is_noticed(monkeypatch, defect):
    install(monkeypatch, modulate_backward=defect)
    with pytest.raises(AssertionError):
        contract.test_gains_on_encoders_and_one_on_the_head("reference", "residual")


def test_a_wrong_link_gradient_is_noticed(monkeypatch):
    monkeypatch.setattr(link, "link_gradient", lambda packed: stats.unpack(packed).gains)
    monkeypatch.setattr(dispatch, "override", "reference")
    with pytest.raises(AssertionError):
        contract.test_gains_on_encoders_and_one_on_the_head("reference", "residual")
