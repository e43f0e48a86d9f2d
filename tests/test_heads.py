"""Heads: M products equal the zero-padded definition, and the fixed definitions of the release."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from arl_fast import BilinearHead, ConcatHead, GatedHead, SharedHead, SumHead, ZeroedHead, modulate


def features(*dims):
    return [torch.randn(6, d, dtype=torch.float64, requires_grad=True) for d in dims]


@pytest.mark.parametrize("dims", [(4,), (4, 3), (4, 3, 5)])
def test_concat_equals_zero_padding(dims):
    """x_m is the fused layer on the concatenation with all other features at zero; gradients agree too."""
    head, z = ConcatHead(list(dims), 7).double(), features(*dims)
    padded = ZeroedHead(lambda parts: nn.functional.linear(torch.cat(parts, 1), head.weight, head.bias))
    upstream = [torch.randn(6, 7, dtype=torch.float64) for _ in range(len(dims) + 1)]
    results = []
    for h in (head, padded):
        out = h(z)
        branches = [out.fused, *out.unimodal]
        results.append([*branches, *torch.autograd.grad(branches, [*z, head.weight, head.bias], upstream)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_concat_identity():
    """fused = sum_m x_m - (M-1) b with the full bias, sum_m x_m with the split one."""
    z = features(4, 3)
    head = ConcatHead([4, 3], 7).double()
    out = head(z)
    torch.testing.assert_close(out.fused, sum(out.unimodal) - head.bias)
    split = ConcatHead([4, 3], 7, bias="split").double()
    out = split(z)
    torch.testing.assert_close(out.fused, sum(out.unimodal))
    none = ConcatHead([4, 3], 7, bias=False)
    assert none.bias is None
    assert [name for name, _ in none.named_parameters()] == ["linear.weight"]


def test_sum_and_shared():
    z = features(4, 4)
    for head in (SumHead([4, 4], 7).double(), SharedHead([4, 4], 7).double()):
        out = head(z)
        torch.testing.assert_close(out.fused, sum(out.unimodal))
    layer = head.layer
    torch.testing.assert_close(out.unimodal[1], layer(z[1]))
    assert len(list(head.parameters())) == 2


def test_gated_is_self_gating():
    z = features(4, 3)
    for gate in (0, 1):
        head = GatedHead([4, 3], 7, hidden=5, gate=gate).double()
        out = head(z)
        h = [layer(x) for layer, x in zip(head.layers, z, strict=True)]
        torch.testing.assert_close(out.fused, head.out(torch.sigmoid(h[gate]) * h[1 - gate]))
        for m in range(2):
            torch.testing.assert_close(out.unimodal[m], head.out(torch.sigmoid(h[m]) * h[m]))


def test_bilinear_is_the_outer_product():
    z = features(4, 4)
    head = BilinearHead([4, 4], 7, hidden=5).double()
    out = head(z)

    def logits(x, y):
        return head.out(head.layer((x.unsqueeze(2) @ y.unsqueeze(1)).flatten(1)))

    torch.testing.assert_close(out.fused, logits(z[0], z[1]))
    for m in range(2):
        torch.testing.assert_close(out.unimodal[m], logits(z[m], z[m]))


class Fusion(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(7, 8), nn.ReLU(), nn.Linear(8, 5))

    def forward(self, z):
        return self.layers(torch.cat(list(z.values()), 1))


def test_zeroed_any_callable():
    fusion = Fusion()
    head = ZeroedHead(fusion)
    z = {"a": torch.randn(6, 4), "b": torch.randn(6, 3)}
    out = head(z)
    torch.testing.assert_close(out.fused, fusion(z))
    torch.testing.assert_close(out.unimodal["a"], fusion({"a": z["a"], "b": torch.zeros(6, 3)}))
    assert len(list(head.parameters())) == 4


@pytest.mark.parametrize("kind", [ConcatHead, SumHead, SharedHead, GatedHead, BilinearHead])
def test_names_order_and_parameters(kind):
    """Dict in, dict out in the head's own order; every parameter is used by all branches."""
    head = kind({"audio": 4, "visual": 4}, 5)
    z = {"visual": torch.randn(3, 4), "audio": torch.randn(3, 4)}
    out = head(z)
    assert list(out.unimodal) == ["audio", "visual"]
    assert out.link.modalities == ("audio", "visual")
    assert "audio" in repr(head)
    listed = kind([4, 4], 5)
    listed.load_state_dict(head.state_dict())
    torch.testing.assert_close(listed([z["audio"], z["visual"]]).fused, out.fused)


def test_modulate_keeps_container_and_values():
    z = {"b": torch.randn(2, 3), "a": torch.randn(2)}
    out, link = modulate(z)
    assert list(out) == ["b", "a"]
    assert all(torch.equal(out[k], z[k]) for k in z)
    assert link.tolist() == [0, 0]
    out, _ = modulate(tuple(z.values()))
    assert isinstance(out, list)


def test_what_a_fusion_does_to_its_containers_stays_its_own():
    class Fusion(nn.Module):
        def forward(self, parts):
            parts[0] = 2 * parts[0]
            parts[1][0] = 3 * parts[1][0]
            return parts[0] + parts[1].pop(0)

    a, v = torch.randn(5, 3), torch.randn(5, 3)
    out = ZeroedHead(Fusion())([a, [v, v]])
    torch.testing.assert_close(out.fused, 2 * a + 3 * v)
    torch.testing.assert_close(out.unimodal[0], 2 * a)
    torch.testing.assert_close(out.unimodal[1], 3 * v)


def test_a_fusion_that_writes_into_its_features_is_an_error():
    """The branches after the first would read what it wrote."""

    def fusion(parts):
        x = parts[0]
        x += 1
        return x + parts[1]

    a, v = torch.randn(5, 3), torch.randn(5, 3)
    with torch.no_grad(), pytest.raises(RuntimeError, match="fusion: wrote into its features in place"):
        ZeroedHead(fusion)([a, v])
    with torch.inference_mode():  # nobody counts what is written there
        ZeroedHead(lambda parts: parts[0] + parts[1])([a, v])
