"""OGM, DGL and Gradient-Blending against their formulas, written out in float64."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import arl_fast
from arl_fast import ARLLoss, ConcatHead, History, ZeroedHead
from arl_fast.family import DGL, Fixed, blended_loss, gammas, gradient_blending, gradient_blending_of

NAMES = ["audio", "visual"]


def model(names=NAMES, bias="split"):
    encoders = nn.ModuleDict({m: nn.Linear(5, 4) for m in names}).double()
    head = ConcatHead(dict.fromkeys(names, 4), 3, bias=bias).double()
    x = {m: (1 + 2 * i) * torch.randn(8, 5, dtype=torch.float64) for i, m in enumerate(names)}
    return encoders, head, x, torch.randint(3, (8,))


def features(encoders, x):
    return {m: encoders[m](x[m]) for m in encoders}


@pytest.mark.parametrize("alpha", [0.1, 1.0])
@pytest.mark.parametrize("names", [NAMES, ["a", "b", "c"]])
def test_ogm_scales_the_encoders_of_a_joint_loss(implementation, names, alpha):
    """Gradients of the fused cross-entropy times 1 - tanh(alpha rho), from softmax sums of W_m z_m + b/M; the
    head's are left.
    """
    encoders, head, x, y = model(names)
    ARLLoss(gamma=0.0, rule="ogm", temperature=alpha)(head(features(encoders, x)), y).backward()
    got = {name: p.grad.clone() for name, p in [*encoders.named_parameters(), *head.named_parameters()]}
    for p in [*encoders.parameters(), *head.parameters()]:
        p.grad = None

    z = features(encoders, x)
    F.cross_entropy(head.linear(torch.cat(list(z.values()), 1)), y).backward()
    parts, shift = head.linear.weight.detach().split(4, 1), head.linear.bias.detach() / len(names)
    s = [
        float(sum(torch.softmax(w @ z[m][i].detach() + shift, 0)[y[i]] for i in range(8)))
        for m, w in zip(names, parts, strict=True)
    ]
    scaled = 0
    for m, name in enumerate(names):
        rho = s[m] / ((sum(s) - s[m]) / (len(names) - 1))
        k = 1 - math.tanh(alpha * rho) if rho > 1 else 1
        scaled += k < 1
        for part in ("weight", "bias"):
            torch.testing.assert_close(
                got[f"{name}.{part}"], k * getattr(encoders[name], part).grad, rtol=1e-10, atol=1e-14
            )
    assert 0 < scaled < len(names)
    torch.testing.assert_close(got["linear.weight"], head.linear.weight.grad, rtol=1e-10, atol=1e-14)


def test_dgl_refuses_a_fusion_whose_parameters_it_cannot_detach():
    layer = nn.Linear(4, 3)
    with pytest.raises(TypeError, match="head: got a ZeroedHead around a function, whose parameters are not"):
        DGL(ZeroedHead(lambda parts: layer(parts[0] + parts[1])))
    DGL(ZeroedHead(nn.Sequential(layer)))


def test_dgl_takes_several_features_per_modality_and_keeps_a_mask():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, features, mask):
            audio, visual = (sum(map(self.layer, z)) for z in features)
            return {"fused": audio + visual, "audio": audio, "visual": visual, "mask": mask}

    mask = torch.tensor([[True, False], [True, True]])
    z = [[torch.randn(2, 4, requires_grad=True) for _ in range(2)] for _ in range(2)]
    criterion = ARLLoss(rule="none")
    criterion(DGL(Head())(z, mask), torch.tensor([0, 2])).backward()
    assert criterion.stats.count.tolist() == [2, 2, 1]
    assert all(x.grad is not None for own in z for x in own)


def test_ogm_has_its_own_alpha_and_no_other_gain():
    """alpha is 0.1, or a tensor if it shall change; a wrong one, or another form of gain, is an error."""
    logits, y = [torch.randn(8, 3, dtype=torch.float64) for _ in range(3)], torch.randint(3, (8,))

    def gains(**options):
        return arl_fast.arl_loss(logits[0], logits[1:], y, rule="ogm", **options)[1].gains

    torch.testing.assert_close(gains(), gains(temperature=0.1))
    torch.testing.assert_close(gains(gain="plain"), gains(temperature=torch.tensor(0.1, dtype=torch.float64)))
    assert not torch.equal(gains(), gains(temperature=8.0))
    assert gains(temperature=0).tolist() == [1, 1]
    criterion = ARLLoss(gamma=0.0, rule="ogm")
    assert (criterion.temperature, criterion.options.gain) == (0.1, "plain")
    assert ARLLoss().temperature == 8.0
    assert ARLLoss.paper("crema-d", rule="ogm").temperature == 0.1
    assert ARLLoss.paper("crema-d", rule="ogm", temperature=0.5).temperature == 0.5
    for make in (gains, lambda **options: ARLLoss(rule="ogm", **options)):
        with pytest.raises(ValueError, match=r"gain: got 'residual' with rule='ogm'.*leave it out"):
            make(gain="residual")
        with pytest.raises(ValueError, match=r"temperature: got -0.1, expected a finite number >= 0"):
            make(temperature=-0.1)


def test_rules_are_values_and_compile():
    """Equal where their numbers are, so that options are cached; picklable with the criterion; one graph."""
    assert Fixed((1.0, 2.0)) == Fixed((1.0, 2.0)) != Fixed((1.0, 3.0))
    assert hash(Fixed((1.0, 2.0))) == hash(Fixed((1.0, 2.0)))
    for rule in (Fixed((0.5, 2.0)), "ogm"):
        criterion = pickle.loads(pickle.dumps(ARLLoss(gamma=0.0, rule=rule, gain="plain")))
        encoders, head, x, y = model()
        loss = criterion(head(features(encoders, x)), y)
        gains = criterion.stats.gains

        def step(x, y, criterion=criterion, head=head, encoders=encoders):
            return criterion(head(features(encoders, x)), y)

        torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="eager")(x, y), loss)
        torch.testing.assert_close(criterion.stats.gains, gains)


@pytest.mark.parametrize("kind", ["concat", "zeroed"])
def test_dgl_routes_the_losses(kind):
    """Encoders have the gradient of gamma times the unimodal losses alone, the head that of the fused loss
    alone.
    """
    encoders, head, x, y = model()
    if kind == "zeroed":
        network = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        head = ZeroedHead(lambda z: network(torch.cat(list(z.values()), 1)))
        head.fusion = Concatenate(network)
    loss = ARLLoss(gamma=2.0, rule="none")(DGL(head)(features(encoders, x)), y)
    loss.backward()
    got = {name: p.grad.clone() for name, p in [*encoders.named_parameters(), *head.named_parameters()]}

    out = head(features(encoders, x))
    parameters = list(encoders.parameters())
    unimodal = 2 * sum(F.cross_entropy(logits, y) for logits in out.unimodal.values())
    torch.testing.assert_close(loss, F.cross_entropy(out.fused, y) + unimodal)
    want = torch.autograd.grad(unimodal, parameters, retain_graph=True)
    for (name, _), g in zip(encoders.named_parameters(), want, strict=True):
        torch.testing.assert_close(got[name], g, rtol=1e-10, atol=1e-14)
    want = torch.autograd.grad(F.cross_entropy(out.fused, y), list(head.parameters()))
    for (name, _), g in zip(head.named_parameters(), want, strict=True):
        torch.testing.assert_close(got[name], g, rtol=1e-10, atol=1e-14)


class Concatenate(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, z):
        return self.network(torch.cat(list(z.values()), 1))


def test_dgl_takes_sequences_and_updates_running_statistics_once():
    network = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    head = ZeroedHead(Concatenate(network))
    z = {m: torch.randn(8, 4, requires_grad=True) for m in NAMES}
    head(z)
    once = int(network[1].num_batches_tracked)
    DGL(head)(z)
    assert int(network[1].num_batches_tracked) == 2 * once
    listed = ConcatHead([4, 4], 3)
    out = DGL(listed)(list(z.values()))
    torch.testing.assert_close(out.fused, listed(list(z.values())).fused)
    with torch.no_grad():  # as if it were not there
        assert torch.equal(DGL(listed)(list(z.values())).fused, listed(list(z.values())).fused)


def test_dgl_with_absent_modalities():
    """A head's mask goes through, and None for a modality stays None."""
    head, y = ConcatHead(dict.fromkeys(NAMES, 4), 3), torch.randint(3, (8,))
    z = {m: torch.randn(8, 4) for m in NAMES}
    mask = torch.rand(8, 2) > 0.4
    for given in ((z, mask), (z | {"visual": None},)):
        torch.testing.assert_close(
            ARLLoss(rule="none")(DGL(head)(*given), y), ARLLoss(rule="none")(head(*given), y)
        )


def losses(branches: int = 3) -> list[torch.Tensor]:
    """Of two checkpoints: every branch learns and overfits by some amount."""
    train, gap = torch.rand(branches).double() + 2, 0.1 * torch.rand(branches).double()
    learned, grown = torch.rand(branches).double() + 0.5, 0.1 + 0.2 * torch.rand(branches).double()
    after = train - learned
    return [train, train + gap, after, after + gap + grown]


def test_blending_weights_are_the_papers_optimum():
    """They minimise OGR^2 = sum_k (w_k O_k)^2 / (sum_k w_k G_k)^2, so that no change of the weights lowers
    it.
    """
    t0, h0, t1, h1 = losses()
    weights = gradient_blending(t0, h0, t1, h1)
    G, O = h0 - h1, (h1 - t1) - (h0 - t0)
    assert weights.sum().item() == pytest.approx(1)
    torch.testing.assert_close(weights, G / O**2 / (G / O**2).sum())

    def ogr(w):
        return float((w * O).square().sum() / (w * G).sum().square())

    best = ogr(weights)
    for _ in range(200):
        assert ogr((weights + 0.05 * torch.randn(3).double()).clamp_min(0)) >= best * (1 - 1e-12)
    torch.testing.assert_close(gammas(weights), weights[1:] / weights[0])


def test_blending_where_the_formula_has_no_answer():
    t0, h0, t1, h1 = losses()
    lost = h1.clone()
    lost[1] = h0[1] + 0.1  # its held-out loss rises
    weights = gradient_blending(t0, h0, t1, lost)
    assert weights[1] == 0
    assert weights.sum().item() == pytest.approx(1)
    flat = t1.clone()
    flat[2] = h1[2] - (h0[2] - t0[2])  # no overfitting at all
    assert torch.isfinite(gradient_blending(t0, h0, flat, h1)).all()
    assert gradient_blending(t0, h0, t1, h0 + 1).tolist() == pytest.approx([1 / 3] * 3)
    with pytest.raises(ValueError, match=r"train_after: got shape \[2\], expected \[M\+1\] losses"):
        gradient_blending(t0, h0, t1[:2], h1)
    with pytest.raises(ValueError, match="floor: got 0, expected a number > 0"):
        gradient_blending(t0, h0, t1, h1, floor=0)
    with pytest.raises(ValueError, match="weights: got 0 for the fused branch"):
        gammas(torch.tensor([0.0, 1.0]))


def test_blending_from_a_history():
    head, criterion = ConcatHead(dict.fromkeys(NAMES, 4), 3), ARLLoss(rule="none")
    history = criterion.track(History())
    seen = []
    for _ in range(3):
        for training in (True, False):
            criterion.train(training)
            with torch.set_grad_enabled(training):
                criterion(head({m: torch.randn(40, 4) for m in NAMES}), torch.randint(3, (40,)))
            seen.append(criterion.stats.loss.double())
        history.end_epoch()
        if history.epoch == 1:
            with pytest.raises(
                ValueError, match="history: got 1 epochs and 1 evaluations, expected at least 2"
            ):
                gradient_blending_of(history)
    torch.testing.assert_close(
        gradient_blending_of(history), gradient_blending(seen[0], seen[1], seen[4], seen[5])
    )
    want = gradient_blending(seen[2], seen[3], seen[4], seen[5])
    torch.testing.assert_close(gradient_blending_of(history, before=1), want)


def test_blended_loss_is_the_weighted_sum():
    out = ConcatHead(dict.fromkeys(NAMES, 4), 3)({m: torch.randn(8, 4, requires_grad=True) for m in NAMES})
    y = torch.randint(3, (8,))
    weights = torch.tensor([0.5, 0.3, 0.2])
    logits = [out.fused, *out.unimodal.values()]
    want = sum(w * F.cross_entropy(x, y) for w, x in zip(weights, logits, strict=True))
    torch.testing.assert_close(blended_loss(out, y, weights), want)
    torch.testing.assert_close(ARLLoss(gamma=gammas(weights), rule="none")(out, y), want / weights[0])
    with pytest.raises(ValueError, match=r"weights: got shape \[2\], expected \[3\]"):
        blended_loss(out, y, weights[:2])
