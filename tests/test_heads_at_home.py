"""Heads in other people's models: replaced layers, old checkpoints, absent features, BatchNorm in fusion."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import arl_fast
from arl_fast import ARLLoss, BilinearHead, ConcatHead, GatedHead, SharedHead, SumHead, ZeroedHead
from arl_fast.integrations.huggingface import compute_loss_func

SIZES = {"audio": 4, "visual": 4}
HEADS = [ConcatHead, SumHead, SharedHead, GatedHead, BilinearHead]


def features(rows=6, **options):
    return {name: torch.randn(rows, size, **options) for name, size in SIZES.items()}


def close(out, want):
    torch.testing.assert_close(out.fused, want.fused)
    for got, expected in zip(out.unimodal.values(), want.unimodal.values(), strict=True):
        torch.testing.assert_close(got, expected, equal_nan=True)


# ---- ConcatHead owns an nn.Linear --------------------------------------------------------------------------


def test_init_functions_find_the_layer():
    head = ConcatHead(SIZES, 5)
    head.apply(lambda m: nn.init.constant_(m.weight, 2.0) if isinstance(m, nn.Linear) else None)
    assert head.weight.unique().tolist() == [2.0]
    assert head.weight is head.linear.weight
    assert head.bias is head.linear.bias


@pytest.mark.parametrize("bias", [True, False])
def test_checkpoints_of_a_bare_linear_load_strictly(bias):
    """Of heads that held weight and bias themselves, and of an nn.Linear in whose place the head now is."""
    old = nn.ModuleDict({"fc": nn.Linear(8, 5, bias=bias)})
    new = nn.ModuleDict({"fc": ConcatHead(SIZES, 5, bias="full" if bias else False)})
    new.load_state_dict(old.state_dict())
    assert torch.equal(new["fc"].weight, old["fc"].weight)
    assert list(new.state_dict()) == ["fc.linear.weight", "fc.linear.bias"][: 1 + bias]
    again = ConcatHead(SIZES, 5, bias="full" if bias else False)
    again.load_state_dict(old["fc"].state_dict())
    again.load_state_dict(new["fc"].state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*linear\.weight"):
        again.load_state_dict({})


def test_from_linear_takes_the_layer_itself():
    layer = nn.Linear(8, 5)
    state = torch.get_rng_state()
    head = ConcatHead.from_linear(layer, SIZES, bias="split")
    assert torch.equal(torch.get_rng_state(), state)
    assert head.linear is layer
    z = features()
    torch.testing.assert_close(head(z).fused, layer(torch.cat(list(z.values()), 1)))
    assert head.bias_mode == "split"
    assert ConcatHead.from_linear(nn.Linear(8, 5, bias=False), SIZES).bias_mode is False
    with pytest.raises(ValueError, match=r"sizes \[4, 4\], which add up to 8, expected the layer's 9 input"):
        ConcatHead.from_linear(nn.Linear(9, 5), SIZES)
    with pytest.raises(TypeError, match=r"linear: got Sequential, expected a torch.nn.Linear"):
        ConcatHead.from_linear(nn.Sequential(layer), SIZES)


class LoRA(nn.Module):
    """A layer around a layer, as adapters are."""

    def __init__(self, base):
        super().__init__()
        self.base, self.a, self.b = base, nn.Linear(8, 2, bias=False), nn.Linear(2, 5, bias=False)

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


@pytest.mark.parametrize("bias", ["full", "split"])
def test_an_adapter_in_the_layers_place_takes_part(bias):
    head = ConcatHead(SIZES, 5, bias)
    adapter = LoRA(head.linear)
    merged = ConcatHead(SIZES, 5, bias)
    merged.load_state_dict({"weight": head.weight + adapter.b.weight @ adapter.a.weight, "bias": head.bias})
    head.linear = adapter
    z = features()
    close(head(z), merged(z))
    with pytest.raises(
        TypeError, match=r"head.loss: got a LoRA in the head.*criterion\(head\(features\), target\)"
    ):
        head.loss(z, torch.zeros(6, dtype=torch.int64))
    shared = SharedHead(SIZES, 5)
    shared.layer = LoRA(shared.layer)
    with pytest.raises(TypeError, match=r"head.loss: got a LoRA"):
        shared.loss(z, torch.zeros(6, dtype=torch.int64))


def test_hooks_parametrisations_and_quantised_layers_take_part():
    head, z = ConcatHead(SIZES, 5), features()
    hooked, want = copy.deepcopy(head), head(z)
    hooked.linear.register_forward_hook(lambda m, i, y: 2 * y)
    torch.testing.assert_close(hooked(z).unimodal["audio"], 2 * want.unimodal["audio"])
    normed = copy.deepcopy(head)
    nn.utils.parametrizations.weight_norm(normed.linear)
    close(normed(z), want)
    loss, _ = normed.loss(z, torch.zeros(6, dtype=torch.int64))
    torch.testing.assert_close(loss, ARLLoss()(normed(z), torch.zeros(6, dtype=torch.int64)))
    quantised = copy.deepcopy(head)
    quantised.linear.__class__ = Eighths
    assert not torch.equal(quantised(z).fused, want.fused)
    torch.testing.assert_close(quantised(z).unimodal["audio"], want.unimodal["audio"], atol=0.5, rtol=0)


class Eighths(nn.Linear):
    """A subclass that computes something else, as quantised layers do."""

    def forward(self, x):
        return F.linear(x, (self.weight * 8).round() / 8, self.bias)


def test_a_criterion_in_a_model_loads_an_old_checkpoint_strictly():
    """Nothing of the criterion in it: its own counter stays. Something, but not all: strict as ever."""

    def model(**criterion):
        return nn.ModuleDict({"head": ConcatHead(SIZES, 5)} | criterion)

    new = model(criterion=ARLLoss(warmup=3, weight=torch.ones(5)))
    new["criterion"].steps.fill_(2)
    new.load_state_dict(model().state_dict())
    assert int(new["criterion"].steps) == 2
    resumed = model(criterion=ARLLoss(warmup=3, weight=torch.zeros(5)))
    resumed.load_state_dict(new.state_dict())
    assert int(resumed["criterion"].steps) == 2
    assert resumed["criterion"].weight.sum() == 5
    partial = {name: x for name, x in new.state_dict().items() if name != "criterion.steps"}
    with pytest.raises(RuntimeError, match=r"Missing key.*criterion\.steps"):
        resumed.load_state_dict(partial)


def test_a_model_that_returns_fused_logits_in_evaluation():
    """The criterion takes them there, so that foreign validation loops need nothing else."""
    head, z, target = ConcatHead(SIZES, 5), features(), torch.randint(0, 5, (6,))
    weight = torch.rand(5)
    criterion = ARLLoss(weight=weight, label_smoothing=0.1).eval()
    fused = head(z).fused
    torch.testing.assert_close(
        criterion(fused, target), F.cross_entropy(fused, target, weight, label_smoothing=0.1)
    )
    assert criterion.stats is None
    with pytest.raises(TypeError, match="output: got Tensor, expected BranchLogits"):
        criterion.train()(fused, target)


# ---- absent features ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 7.0])
def test_absent_features_count_as_zeros_whatever_they_hold(kind, junk):
    """In logits, loss, statistics and every gradient. The unimodal logits say that there is no prediction."""
    head, target = kind(SIZES, 5), torch.randint(0, 5, (6,))
    mask = torch.tensor([[1, 1], [1, 0], [0, 1], [1, 1], [0, 0], [1, 0]], dtype=torch.bool)
    z = features()
    zeroed = {name: x * mask[:, m, None] for m, (name, x) in enumerate(z.items())}
    given = {
        name: x.masked_fill(~mask[:, m, None], junk).requires_grad_() for m, (name, x) in enumerate(z.items())
    }
    out, want = head(given, mask), head({name: x.requires_grad_() for name, x in zeroed.items()})
    torch.testing.assert_close(out.fused, want.fused)
    for m, name in enumerate(SIZES):
        assert torch.equal(out.unimodal[name].isnan().all(1), ~mask[:, m])
    criterion, explicit = ARLLoss(), ARLLoss()
    loss, expected = criterion(out, target), explicit(want, target, mask)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(criterion.stats, explicit.stats)
    got = torch.autograd.grad(loss, [*head.parameters(), *given.values()])
    wanted = torch.autograd.grad(expected, [*head.parameters(), *zeroed.values()])
    for a, b in zip(got, wanted[: len(got) - 2], strict=False):
        torch.testing.assert_close(a, b)
    for m, (a, b) in enumerate(zip(got[-2:], wanted[-2:], strict=True)):
        torch.testing.assert_close(a, b * mask[:, m, None])


@pytest.mark.parametrize("kind", HEADS)
def test_none_stands_for_a_modality_that_the_batch_lacks(kind):
    head, target = kind(SIZES, 5), torch.randint(0, 5, (6,))
    z = features()
    mask = torch.tensor([[True, False]]).expand(6, 2)
    out = head({"audio": z["audio"], "visual": None})
    close(out, head(z, mask))
    criterion = ARLLoss()
    assert criterion(out, target).isfinite()
    assert criterion.stats.gains.tolist() == [2.0, 1.0]
    assert not ARLLoss()((out.fused, list(out.unimodal.values()), torch.zeros(2)), target).isfinite()
    both = torch.tensor([[True, True]] * 5 + [[False, True]])
    close(head({"audio": z["audio"], "visual": None}, both), head(z, both & mask))
    with pytest.raises(ValueError, match=r"features\['audio'\]: got NoneType, expected \[B, 4\]"):
        head({"audio": None, "visual": None})
    with pytest.raises(ValueError, match=r"mask: got shape \[5, 2\], expected \[B, M\] = \[6, 2\]"):
        head(z, mask[:5])


@pytest.mark.parametrize("kind", [ConcatHead, SumHead, SharedHead])
def test_absent_features_in_the_linear_loss(kind):
    head, target = kind(SIZES, 5), torch.randint(0, 5, (6,))
    mask = torch.rand(6, 2) < 0.6
    z = {name: x.masked_fill(~mask[:, m, None], torch.nan) for m, (name, x) in enumerate(features().items())}
    loss, stats = head.loss(z, target, mask=mask)
    criterion = ARLLoss()
    torch.testing.assert_close(loss, criterion(head(z, mask), target))
    torch.testing.assert_close(stats, criterion.stats)
    loss, stats = head.loss({"audio": z["audio"], "visual": None}, target, criterion, mask=mask)
    assert loss.isfinite()
    assert stats.count[2] == 0


def test_the_mask_reaches_the_loss_in_every_way():
    """With the link, as an argument, in a dict, detached, and through the Trainer's adapter."""
    head, target = ConcatHead(SIZES, 5), torch.randint(0, 5, (6,))
    mask = torch.tensor([[True, True]] * 4 + [[True, False]] * 2)
    out = head(features(), mask)
    criterion = ARLLoss()
    want = criterion(out, target, mask)
    bare = torch.zeros(2)
    dict_output = {"fused": out.fused, **out.unimodal, "link": bare, "mask": mask}
    for output in (
        out,
        dict_output,
        {**dict_output, "link": out.link, "mask": None},
        arl_fast.optim.detach_link(out),
    ):
        torch.testing.assert_close(criterion(output, target), want)
    summed = ARLLoss(reduction="sum")
    total = summed(out, target)
    for output in ({"loss": want, **dict_output}, {"fused": out.fused, **out.unimodal, "link": out.link}):
        torch.testing.assert_close(compute_loss_func(summed)(output, target, num_items_in_batch=6), total / 6)


def test_masked_heads_compile():
    """The link cannot carry the mask: as an argument it works, without it the loss is NaN, not wrong."""
    head, z, target = ConcatHead(SIZES, 5), features(), torch.randint(0, 5, (6,))
    mask = torch.tensor([[True, True]] * 4 + [[True, False]] * 2)
    criterion = ARLLoss()
    step = torch.compile(
        lambda z, mask: criterion(head(z, mask), target, mask), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(step(z, mask), criterion(head(z, mask), target))
    without = torch.compile(
        lambda z, mask: criterion(head(z, mask), target), fullgraph=True, backend="aot_eager"
    )
    assert without(z, mask).isnan()


# ---- ZeroedHead --------------------------------------------------------------------------------------------


class Fusion(nn.Module):
    def __init__(self, norm=nn.BatchNorm1d):
        super().__init__()
        self.first, self.norm, self.out = nn.Linear(8, 6), norm(6), nn.Linear(6, 5)

    def forward(self, z):
        return self.out(self.norm(self.first(torch.cat(list(z.values()), 1))).relu())


def running(module):
    return [x.clone() for name, x in module.named_buffers() if "running" in name or "tracked" in name]


@pytest.mark.parametrize("kind", ["module", "method", "closure"])
def test_unimodal_passes_leave_running_statistics_alone(kind):
    """As after one fused pass; they had been updated M + 1 times, mostly with zeroed inputs."""
    fusion, z = Fusion(), features()
    once = copy.deepcopy(fusion)
    once(z)
    given = {"module": fusion, "method": fusion.forward, "closure": lambda z: fusion(z)}[kind]
    head = ZeroedHead(given)
    out = head(z)
    for got, want in zip(running(fusion), running(once), strict=True):
        torch.testing.assert_close(got, want)
    audio = copy.deepcopy(once)({"audio": z["audio"], "visual": torch.zeros(6, 4)})
    torch.testing.assert_close(out.unimodal["audio"], audio)  # normalised by its own batch, as before
    assert fusion.norm.track_running_stats
    head.eval()
    fusion.eval()
    torch.testing.assert_close(head(z).fused, once.eval()(z))


def test_unimodal_passes_update_them_if_asked_to_and_frozen_layers_stay_frozen():
    fusion, z = Fusion(), features()
    thrice = copy.deepcopy(fusion)
    for name in (None, "audio", "visual"):
        thrice({other: x if name in (None, other) else torch.zeros_like(x) for other, x in z.items()})
    ZeroedHead(fusion, track_unimodal=True)(z)
    for got, want in zip(running(fusion), running(thrice), strict=True):
        torch.testing.assert_close(got, want)
    frozen = Fusion()
    frozen.norm.eval()
    before = running(frozen)
    ZeroedHead(frozen)(z)
    assert all(torch.equal(a, b) for a, b in zip(running(frozen), before, strict=True))


def test_running_statistics_survive_an_error_and_compile():
    fusion, z = Fusion(), features()
    eager = copy.deepcopy(fusion)
    compiled = torch.compile(ZeroedHead(fusion), fullgraph=True, backend="aot_eager")
    close(compiled(z), ZeroedHead(eager)(z))
    for got, want in zip(running(fusion), running(eager), strict=True):
        torch.testing.assert_close(got, want)
    calls = []

    def fails(z):
        calls.append(fusion(z))
        if len(calls) == 2:
            raise KeyError("second")
        return calls[-1]

    with pytest.raises(KeyError):
        ZeroedHead(fails)(z)
    assert fusion.norm.track_running_stats


def test_absent_tokens_are_learned():
    tokens = {name: nn.Parameter(torch.randn(size)) for name, size in SIZES.items()}
    fusion, z = Fusion(nn.LayerNorm), features()
    head = ZeroedHead(fusion, absent=tokens)
    out = head(z)
    torch.testing.assert_close(
        out.unimodal["audio"], fusion({"audio": z["audio"], "visual": tokens["visual"].expand(6, 4)})
    )
    assert {"absent_audio", "absent_visual"} < set(head.state_dict())
    ARLLoss()(out, torch.randint(0, 5, (6,))).backward()
    assert all(p.grad.abs().sum() > 0 for p in head.parameters())
    fixed = ZeroedHead(fusion, absent={"audio": torch.ones(4), "visual": torch.ones(4)})
    assert {"absent_audio", "absent_visual"} <= dict(fixed.named_buffers()).keys()


def test_absent_by_a_mask_and_by_a_callable():
    z = features()
    seen = []

    def pooled(z, mask):
        seen.append(mask)
        weights = mask.float() / mask.sum(1, keepdim=True)
        return sum(weights[:, m, None] * x for m, x in enumerate(z.values()))

    mask = torch.tensor([[True, True]] * 4 + [[True, False]] * 2)
    out = ZeroedHead(pooled, absent="mask")(z, mask)
    assert torch.equal(seen[0], mask)
    assert torch.equal(seen[1], torch.tensor([[True, False]]).expand(6, 2))
    torch.testing.assert_close(out.unimodal["audio"], z["audio"])
    mean = {"audio": 1.0, "visual": 2.0}
    fusion = Fusion(nn.LayerNorm)
    out = ZeroedHead(fusion, absent=lambda name, x: torch.full_like(x, mean[name]))(z)
    torch.testing.assert_close(
        out.unimodal["visual"], fusion({"audio": torch.ones(6, 4), "visual": z["visual"]})
    )


@pytest.mark.parametrize("missing", ["zeros", "tokens"])
def test_zeroed_head_with_absent_and_several_features(missing):
    """Lists stay lists; NaN in absent rows reaches neither logits nor gradients."""
    fusion = lambda z: torch.cat([*z["audio"], z["visual"]], 1)[:, :5]  # noqa: E731
    token = {"audio": torch.full((4,), 3.0), "visual": torch.zeros(4)}
    head = ZeroedHead(fusion, absent=missing if missing == "zeros" else token)
    z = {"audio": [torch.randn(3, 4), torch.randn(3, 4)], "visual": torch.randn(3, 4)}
    mask = torch.tensor([[False, True], [True, True], [True, False]])
    for x in z["audio"]:
        x[0] = torch.nan
        x.requires_grad_()
    out = head(z, mask)
    assert out.fused[0].tolist() == [0.0 if missing == "zeros" else 3.0] * 5
    ARLLoss()(out, torch.tensor([0, 1, 2])).backward()
    assert all(x.grad.isfinite().all() for x in z["audio"])
    assert out.unimodal["audio"].isnan().all(1).tolist() == [True, False, False]


def test_zeroed_head_says_what_is_wrong():
    z = features()
    with pytest.raises(ValueError, match=r"absent: got .mean., expected one of 'zeros', 'mask'"):
        ZeroedHead(Fusion(), absent="mean")
    with pytest.raises(TypeError, match="absent: got int, expected 'zeros', 'mask', tensors by modality"):
        ZeroedHead(Fusion(), absent=3)
    with pytest.raises(TypeError, match=r"absent\['audio'\]: got int, expected a Tensor"):
        ZeroedHead(Fusion(), absent={"audio": 3})
    with pytest.raises(ValueError, match="absent: got no tensor for the modality 'visual'"):
        ZeroedHead(Fusion(), absent={"audio": torch.zeros(4)})(z)
    with pytest.raises(
        ValueError, match=r"absent: the callable returned .*\[4\] for 'audio', expected .*\[6, 4\]"
    ):
        ZeroedHead(Fusion(), absent=lambda name, x: torch.zeros(4))(z)


# ---- for editors -------------------------------------------------------------------------------------------

SNIPPET = """
import torch, arl_fast
x = torch.randn(2, 4)
reveal_type(arl_fast.ConcatHead([4, 4], 5)([x, x]))
reveal_type(arl_fast.ZeroedHead(torch.nn.Identity())({"a": x}, mask=None))
reveal_type(arl_fast.ARLLoss()((x, [x]), x))
reveal_type(arl_fast.modulate({"a": [x], "b": [x, x]})[0])
reveal_type(arl_fast.modulate([x])[0])
"""


def test_calls_are_typed(tmp_path):
    """An editor completes what follows ``out.``; nn.Module's own ``__call__`` returns Any."""
    pytest.importorskip("mypy", reason="mypy is not installed")
    file = tmp_path / "snippet.py"
    file.write_text(SNIPPET)
    root = Path(arl_fast.__file__).parents[1]
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file=",
        f"--cache-dir={root / '.mypy_cache' / 'typed'}",
        str(file),
    ]
    run = subprocess.run(command, capture_output=True, text=True, cwd=root)
    revealed = [
        line.split('"')[1].replace("builtins.", "") for line in run.stdout.splitlines() if "Revealed" in line
    ]
    tensor = "torch._tensor.Tensor"
    assert revealed[0] == revealed[1], run.stdout
    assert revealed[0].endswith("arl_fast._core.branches.BranchLogits]")
    assert revealed[2:] == [tensor, f"dict[str, list[{tensor}]]", f"list[{tensor}]"]
