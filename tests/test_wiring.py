"""Wrong wirings, which would leave encoders without their gains, raise, warn or are found by ``check``."""

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
    for got, want in zip(
        grads_of(torch.compile(step, fullgraph=True, backend="aot_eager")(*z), z), eager, strict=True
    ):
        torch.testing.assert_close(got, want)


def test_a_flat_list_of_several_features_per_modality_raises():
    """Its link is a multiple of M, as DataParallel's is; a2 would get the visual gain, v1 the audio one."""
    z, target = four_features()
    (a1, a2, v1, v2), link = modulate(z)
    unimodal = [a1 + a2, v1 + v2]
    message = (
        r"link: got shape \[4\], expected \[2\].* {'audio': \[a1, a2\], 'visual': \[v1, v2\]}.*DataParallel"
    )
    with pytest.raises(ValueError, match=message):
        arl_loss(unimodal[0] + unimodal[1], unimodal, target, link)


def test_a_gathered_link_of_replicas_with_flat_lists_raises():
    """Replicas of a model that gives four features in one list, or one replica's link twice."""
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
    features = [
        modulate({"a": [x[rows] for x in z[:2]], "v": [x[rows] for x in z[2:]]})
        for rows in (slice(3), slice(3, 8))
    ]
    a = Gather.apply(*(f["a"][0] + f["a"][1] for f, _ in features))
    v = Gather.apply(*(f["v"][0] * f["v"][1] for f, _ in features))
    link = Gather.apply(*(link for _, link in features))
    plain = grads_of(arl_loss(a + v, [a, v], target, rule="none")[0], z)
    loss, stats = arl_loss(a + v, [a, v], target, link)
    for i, (got, want) in enumerate(zip(grads_of(loss, z), plain, strict=True)):
        torch.testing.assert_close(got, want * stats.gains[i // 2])


# ---- what a criterion's first step tells -------------------------------------------------------------------


class Model(nn.Module):
    """Two encoders and a head; ``wire`` may be replaced by a wrong one."""

    def __init__(self, head=None):
        super().__init__()
        torch.manual_seed(0)
        self.audio, self.visual = nn.Linear(6, 4), nn.Linear(6, 4)
        self.head = head or arl_fast.ConcatHead({"audio": 4, "visual": 4}, 5)

    def forward(self, audio, visual):
        return self.head(self.features(audio, visual))

    def features(self, audio, visual):
        return {"audio": self.audio(audio), "visual": self.visual(visual)}


class Raw(Model):
    """The head gets the features that went into modulate; the link is that of modulate."""

    def forward(self, audio, visual):
        raw = self.features(audio, visual)
        _, link = modulate(raw)
        return BranchLogits(*self.head(raw)[:2], link)


def batch(rows=16):
    return torch.randn(rows, 6), torch.randn(rows, 6), torch.randint(0, 5, (rows,))


def said(*arguments, **options):
    """The warnings of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        arguments[0](*arguments[1:], **options)
    return [str(w.message) for w in caught if w.category is UserWarning]


def test_a_link_beside_the_path_to_the_loss_raises():
    """The statistics tell of gains that no encoder gets."""
    audio, visual, target = batch()
    model = Model()
    raw = model.features(audio, visual)
    _, link = modulate(raw)
    logits = model.head.branches(list(raw.values()))
    with pytest.raises(ValueError, match="link: got one whose modulate took no part in these logits"):
        ARLLoss()((logits[0], dict(zip(raw, logits[1], strict=True)), link), target)


def test_a_link_of_another_step_raises():
    audio, visual, target = batch()
    model = Model()
    stale = model(audio, visual).link
    with pytest.raises(ValueError, match="link: got one whose modulate took no part"):
        ARLLoss()(model(audio, visual)._replace(link=stale), target)


def test_the_function_says_so_in_backward(implementation):
    if implementation == "native":
        pytest.skip("csrc's modulate does not say it")
    z = [torch.randn(4, 3, requires_grad=True) for _ in range(2)]
    _, link = modulate(z)
    loss, _ = arl_loss(z[0] + z[1], z, torch.randint(0, 3, (4,)), link)
    messages = said(loss.backward)
    assert len(messages) == 1
    assert "none of its gradient came through the features that modulate returned" in messages[0]


def test_detach_link_without_update_gains_warns_once():
    audio, visual, target = batch()
    model, criterion = Model(), ARLLoss()
    first, second = (
        said(criterion, arl_fast.optim.detach_link(model(audio, visual)), target) for _ in range(2)
    )
    assert len(first) == 1
    assert "link: got that of detach_link, but no UpdateGains was given this criterion" in first[0]
    assert second == []
    assert said(ARLLoss(rule="none"), arl_fast.optim.detach_link(model(audio, visual)), target) == []


def test_update_gains_without_detach_link_raises():
    """Whether it comes before or after the first step; taken away, the criterion is as before."""
    audio, visual, target = batch()
    model, criterion = Model(), ARLLoss()
    criterion(model(audio, visual), target)
    optimizer = torch.optim.SGD(
        [{"params": m.parameters()} for m in (model.audio, model.visual, model.head)], lr=0.1
    )
    updates = arl_fast.optim.UpdateGains(optimizer, {"audio": 0, "visual": 1}, criterion)
    with pytest.raises(ValueError, match=r"link: got one that scales gradients.*2\.25"):
        criterion(model(audio, visual), target)
    with pytest.raises(ValueError, match=r"features: got some whose gradients the linear loss scales.*2\.25"):
        model.head.loss(model.features(audio, visual), target, criterion)
    assert said(criterion, arl_fast.optim.detach_link(model(audio, visual)), target) == []
    updates.remove()
    criterion(model(audio, visual), target)


def test_a_link_that_leads_nowhere_warns():
    audio, visual, target = batch()
    model = Model().requires_grad_(False)
    model.head.requires_grad_(True)
    messages = said(ARLLoss(), model(audio, visual), target)
    assert len(messages) == 1
    assert "link: got one that leads to no encoder" in messages[0]


def test_nothing_is_said_of_right_wirings():
    """Evaluation first, a frozen encoder, a compiled model, a checkpoint that hides modulate."""
    audio, visual, target = batch()
    model = Model(arl_fast.ZeroedHead(lambda z: sum(x.tanh() for x in z.values()).repeat(1, 2)))
    criterion = ARLLoss()
    with torch.no_grad():
        assert said(criterion, model(audio, visual), target) == []
    model.audio.requires_grad_(False)
    assert said(criterion, model(audio, visual), target) == []
    assert said(ARLLoss(), torch.compile(Model(), backend="aot_eager")(audio, visual), target) == []
    out = torch.utils.checkpoint.checkpoint(
        lambda a, v: (*(o := Model()(a, v)).unimodal.values(), o.fused, o.link),
        audio.requires_grad_(),
        visual,
        use_reentrant=True,
    )
    assert said(ARLLoss(), (out[2], list(out[:2]), out[3]), target) == []


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adafactor])
def test_an_optimiser_of_adams_kind_warns_once(cls):
    """In its own first step, and only if it has parameters of these encoders."""
    audio, visual, target = batch()
    model, other = Model(), nn.Linear(2, 2)
    optimizer, unrelated = cls(model.parameters(), lr=1e-3), torch.optim.Adam(other.parameters())
    criterion = ARLLoss()
    criterion(model(audio, visual), target).backward()
    other(torch.randn(3, 2)).sum().backward()
    assert said(unrelated.step) == []
    messages = said(optimizer.step)
    assert len(messages) == 1
    assert f"{cls.__name__} divides each gradient by a running estimate of its size" in messages[0]
    criterion(model(audio, visual), target).backward()
    assert said(optimizer.step) == []


def test_models_that_wait_for_their_optimiser_do_not_get_in_each_others_way():
    """The first has had a backward pass and no step; its encoders are of another size."""
    y = torch.randint(3, (5,))
    waiting = []
    for size in (4, 7):
        encoders = nn.ModuleDict({m: nn.Linear(6, size) for m in ("audio", "visual")})
        head = arl_fast.ConcatHead(dict.fromkeys(encoders, size), 3)
        ARLLoss()(head({m: e(torch.randn(5, 6)) for m, e in encoders.items()}), y).backward()
        waiting.append((encoders, head))
    for encoders, _ in reversed(waiting):
        assert len(said(torch.optim.Adam(encoders.parameters()).step)) == 1


@pytest.mark.parametrize("case", ["sgd", "none", "updates", "linear"])
def test_which_optimisers_are_left_alone(case):
    """SGD, a rule without gains, gains on the update. The linear loss has no link, yet its gains cancel."""
    audio, visual, target = batch()
    model, criterion = Model(), ARLLoss(rule="none" if case == "none" else "share")
    cls = torch.optim.SGD if case == "sgd" else torch.optim.AdamW
    optimizer = cls([{"params": m.parameters()} for m in (model.audio, model.visual, model.head)], lr=1e-3)
    if case == "updates":
        arl_fast.optim.UpdateGains(optimizer, {"audio": 0, "visual": 1}, criterion)
        criterion(arl_fast.optim.detach_link(model(audio, visual)), target).backward()
    elif case == "linear":
        model.head.loss(model.features(audio, visual), target, criterion)[0].backward()
    else:
        criterion(model(audio, visual), target).backward()
    assert len(said(optimizer.step)) == (case == "linear")


def test_a_compiled_optimiser_step_with_the_hook_in_place():
    audio, visual, target = batch()
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ARLLoss()(model(audio, visual), target).backward()
    before = model.audio.weight.detach().clone()
    torch.compile(optimizer.step, backend="eager")()
    torch.testing.assert_close(model.audio.weight.detach(), before - 0.1 * model.audio.weight.grad)


# ---- one's own gains ---------------------------------------------------------------------------------------


def regression():
    model, (audio, visual, _) = Model(), batch()
    features, link = modulate(model.features(audio, visual))
    return model, (sum(features.values()) - 1).square().mean(), link


@pytest.mark.parametrize("gains", [GAINS, GAINS.tolist(), GAINS.double().requires_grad_()])
def test_apply_gains_scales_any_loss(gains):
    model, loss, link = regression()
    parameters = [model.audio.weight, model.visual.weight]
    plain = grads_of(loss, parameters)
    scaled = apply_gains(loss, link, gains)
    assert torch.equal(scaled, loss)
    for got, want, gain in zip(grads_of(1024 * scaled, parameters), plain, GAINS, strict=True):
        torch.testing.assert_close(got, 1024 * gain * want)


def test_apply_gains_takes_gathered_links_and_names_what_is_wrong():
    _, loss, link = regression()
    _, other, second = regression()
    apply_gains(loss + other, torch.cat([link, second]), GAINS).backward()
    with pytest.raises(
        ValueError, match=r"gains: got shape \[3\], expected \[2\], one gain per entry of the link"
    ):
        apply_gains(loss, link, [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"gains: got shape \[1\], expected \[2\]"):
        apply_gains(loss, link, [1.0])
    with pytest.raises(
        TypeError, match=r"link: got NoneType, expected the second result of arl_fast.modulate"
    ):
        apply_gains(loss, None, [1.0, 2.0])
    with torch.no_grad():
        assert apply_gains(loss, link, GAINS) is loss


def test_apply_gains_compiled():
    model, (audio, visual, _) = Model(), batch()

    def step(audio, visual):
        features, link = modulate(model.features(audio, visual))
        return apply_gains((sum(features.values()) - 1).square().mean(), link, GAINS)

    parameters = [model.audio.weight, model.visual.weight]
    compiled = grads_of(torch.compile(step, fullgraph=True, backend="aot_eager")(audio, visual), parameters)
    for got, want in zip(compiled, grads_of(step(audio, visual), parameters), strict=True):
        torch.testing.assert_close(got, want)


# ---- arl_fast.check ----------------------------------------------------------------------------------------


def test_check_of_a_right_wiring():
    """Factors as said; heads with a layer per modality are no encoders; nothing is left behind."""
    for head in (
        None,
        arl_fast.SumHead({"audio": 4, "visual": 4}, 5),
        arl_fast.GatedHead({"audio": 4, "visual": 4}, 5),
    ):
        model, criterion = Model(head), ARLLoss(warmup=7)
        model.norm = nn.BatchNorm1d(6)
        model.register_forward_pre_hook(lambda m, args: (m.norm(args[0]), *args[1:]))
        model.audio.weight.grad = torch.ones_like(model.audio.weight)
        before = {name: x.clone() for name, x in model.state_dict().items()}
        given = batch()
        state = torch.get_rng_state()
        result = arl_fast.check(model, given, criterion, torch.optim.SGD(model.parameters(), lr=0.1))
        assert torch.equal(torch.get_rng_state(), state)
        assert result.ok, str(result)
        for name, gain in result.said.items():
            assert abs(gain - 1) > 0.1
            assert result.real[name] == pytest.approx(gain, rel=1e-4)
        assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
        assert torch.equal(model.audio.weight.grad, torch.ones(4, 6))
        assert criterion.stats is None
        assert int(criterion.steps) == 0
    assert "every encoder gets its gain" in str(result)
    assert "audio" in str(result)


def problem(model, *arguments, **options):
    result = arl_fast.check(model, batch(), *arguments, **options)
    assert not result.ok
    assert len(result.problems) == 1, str(result)
    return result, result.problems[0]


class Bypass(Model):
    """The visual feature goes to the head as it was before modulate."""

    def forward(self, audio, visual):
        raw = self.features(audio, visual)
        features, link = modulate(raw)
        logits = self.head.branches([features["audio"], raw["visual"]])
        return BranchLogits(logits[0], dict(zip(raw, logits[1], strict=True)), link)


def test_check_names_features_that_bypass_modulate():
    result, text = problem(Bypass(), ARLLoss())
    assert text.startswith("'visual': the gradient of visual.bias, visual.weight bypasses modulate")
    assert result.real["audio"] == pytest.approx(result.said["audio"], rel=1e-4)
    assert result.real["visual"] == pytest.approx(1.0)
    assert result.said["visual"] > 1.1


def test_check_says_real_one_where_the_statistics_say_more():
    result, text = problem(Raw(), ARLLoss())
    assert "its modulate took no part in these logits" in text
    assert list(result.real.values()) == pytest.approx([1.0, 1.0])


class Swapped(Model):
    """A list of features in one order, a list of logits in the other."""

    def forward(self, audio, visual):
        (v, a), link = modulate(list(reversed(self.features(audio, visual).values())))
        return BranchLogits(*self.head.branches([a, v]), link)


def test_check_finds_swapped_gains_even_where_they_are_equal():
    for criterion in (ARLLoss(), ARLLoss(rule="constant")):
        result = arl_fast.check(Swapped(), batch(), criterion)
        assert [p.split(":")[0] for p in result.problems] == ["0", "1"]
        assert (
            "0: audio.bias, audio.weight get the gain of 1: the features of modulate and the unimodal"
            in str(result)
        )


class Skip(Model):
    """An encoder beside modulate that only the fused logits see, and half of the audio gradient beside it."""

    def __init__(self):
        super().__init__()
        self.extra = nn.Embedding(3, 5)

    def forward(self, audio, visual):
        raw = self.features(audio, visual)
        features, link = modulate(raw)
        logits = self.head.branches([(features["audio"] + raw["audio"]) / 2, features["visual"]])
        fused = logits[0] + self.extra((visual[:, 0] > 0).long())
        return BranchLogits(fused, dict(zip(raw, logits[1], strict=True)), link)


def test_check_finds_a_part_beside_modulate_and_what_only_the_fused_logits_see():
    result = arl_fast.check(Skip(), batch(), ARLLoss())
    assert len(result.problems) == 2
    assert (
        "'audio': a part of the gradient of audio.bias, audio.weight bypasses modulate" in result.problems[0]
    )
    assert result.problems[1].startswith(
        "the gradient of extra.weight bypasses modulate: these are computed from the data"
    )
    assert result.real["audio"] == pytest.approx((1 + result.said["audio"]) / 2, rel=1e-4)


class Shared(Model):
    def features(self, audio, visual):
        return {"audio": self.audio(self.visual(audio) @ torch.ones(4, 6)), "visual": self.visual(visual)}


def test_check_notes_shared_parameters():
    result = arl_fast.check(Shared(), batch(), ARLLoss())
    assert result.ok
    assert any("several modalities share visual.bias, visual.weight" in note for note in result.notes)
    assert any("'visual': no parameter moves its unimodal logits alone" in note for note in result.notes)


def test_check_of_links_and_optimisers():
    model, criterion = Model(), ARLLoss()

    def groups():
        return [{"params": m.parameters()} for m in (model.audio, model.visual, model.head)]

    _, text = problem(model, criterion, torch.optim.AdamW(model.parameters()))
    assert "optimizer: AdamW divides each gradient" in text

    def detached(model, batch):
        return arl_fast.optim.detach_link(model(*batch[:2])), batch[2]

    _, text = problem(model, criterion, step=detached)
    assert "link: got that of detach_link" in text
    updates = arl_fast.optim.UpdateGains(torch.optim.AdamW(groups()), {"audio": 0, "visual": 1}, criterion)
    result = arl_fast.check(model, batch(), criterion)
    assert result.ok, str(result)
    assert list(result.real.values()) == pytest.approx(list(result.said.values()))
    updates.remove()
    updates = arl_fast.optim.UpdateGains(torch.optim.AdamW(groups()), {"audio": 0, "visual": 2}, criterion)
    result = arl_fast.check(model, batch(), criterion)
    assert (
        "'visual': visual.bias, visual.weight in none of the parameter groups of its modality"
        in result.problems[0]
    )
    assert (
        "head.linear.bias, head.linear.weight in a modality's parameter group, but a part of the head"
        in str(result)
    )


def test_check_takes_dicts_masks_and_wrapped_models():
    class Named(Model):
        def forward(self, audio, visual, mask=None):
            out = self.head(self.features(audio, visual), mask)
            return {"fused": out.fused, **out.unimodal, "link": out.link}

    audio, visual, target = batch()
    mask = torch.rand(16, 2) < 0.8
    given = {"audio": audio, "visual": visual, "mask": mask, "labels": target}
    for model in (Named(), nn.DataParallel(Named()), torch.compile(Named(), backend="eager")):
        assert arl_fast.check(model, given, ARLLoss()).ok
    with pytest.raises(
        TypeError, match=r"batch: got Tensor, expected \(inputs..., target\) or a dict with one of labels"
    ):
        arl_fast.check(Named(), audio, ARLLoss())
    with pytest.raises(TypeError, match="criterion: got Linear, expected an ARLLoss"):
        arl_fast.check(Named(), given, nn.Linear(1, 1))
