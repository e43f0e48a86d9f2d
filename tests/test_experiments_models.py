"""The experiments' models and methods: where the gain acts, and what an absent modality is."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F

import arl_fast
from experiments.config import CONFIGS, Config
from experiments.methods import SimpleMMLLoss, methods, select
from experiments.models import build
from experiments.models.intermediate import CrossModalTransformer
from experiments.models.resnet import ResNet18

CLIPS = {"audio": [1, 17, 20], "visual": [2, 3, 16, 16]}
WORDS = {"text": [10, 12], "audio": [10, 5], "vision": [10, 7]}
SMALL = {"image": [1, 28, 28], "strokes": [64, 3]}
VIEWS = {"a": [3], "b": [4]}
MODELS = [
    *(
        pytest.param("resnet18", fusion, CLIPS, id=f"resnet18-{fusion}")
        for fusion in ("concat", "sum", "shared", "gated", "mmtm", "transformer")
    ),
    pytest.param("transformer", "concat", WORDS, id="mosi-concat"),
    pytest.param("transformer", "transformer", WORDS, id="mosi-transformer"),
    pytest.param("small", "concat", SMALL, id="small-concat"),
    pytest.param("small", "bilinear", SMALL, id="small-bilinear"),
    pytest.param("mlp", "concat", VIEWS, id="mlp-concat"),
]


def batch(shapes, rows=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(rows, *shape, generator=generator) for name, shape in shapes.items()}


def model(encoder, fusion, shapes, classes=3, **options):
    torch.manual_seed(0)
    return build(
        dataclasses.replace(Config(), encoder=encoder, fusion=fusion, width=16), shapes, classes, **options
    )


@pytest.mark.parametrize(("encoder", "fusion", "shapes"), MODELS)
def test_every_model_trains_two_steps(encoder, fusion, shapes):
    net, x, y = model(encoder, fusion, shapes), batch(shapes), torch.tensor([0, 1, 2, 0])
    criterion = arl_fast.ARLLoss()
    optimizer = torch.optim.SGD(net.parameters(), 1e-3)
    losses = []
    for _ in range(3):
        out = net(x)
        assert out.fused.shape == (4, 3)
        assert list(out.unimodal) == list(shapes)
        loss = criterion(out, y)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.encode.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]


def test_resnet18_has_torchvisions_parameters():
    names = dict(ResNet18(3).named_parameters())
    # torchvision's without the last layer
    assert sum(p.numel() for p in names.values()) == 11_689_512 - 513_000
    assert {
        "conv1.weight",
        "layer1.0.bn2.bias",
        "layer2.0.downsample.0.weight",
        "layer4.1.conv2.weight",
    } <= set(names)
    assert ResNet18(1).eval()(torch.zeros(2, 1, 64, 64)).shape == (2, 512)


def encoder_gradients(net, x, y, criterion):
    net.zero_grad()
    criterion(net(x), y).backward()
    head = torch.cat([p.grad.flatten() for p in net.head.parameters()])
    return {name: p.grad.clone() for name, p in net.encode.named_parameters()}, head


@pytest.mark.parametrize("fusion", ["concat", "mmtm", "transformer"])
def test_the_gain_scales_what_flows_back_through_each_encoders_end(fusion):
    net, x, y = model("resnet18", fusion, CLIPS).double().eval(), batch(CLIPS), torch.tensor([0, 1, 2, 0])
    x = {name: value.double() for name, value in x.items()}
    gradients = {}
    for a in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0)):
        criterion = arl_fast.ARLLoss(rule=lambda stats, a=a: torch.tensor(a, dtype=torch.float64))
        gradients[a], head = encoder_gradients(net, x, y, criterion)
        if a == (0.0, 0.0):
            plain, plain_head = encoder_gradients(net, x, y, arl_fast.ARLLoss(rule="none"))
            assert all(torch.allclose(plain[name], g) for name, g in gradients[a].items())
        assert torch.allclose(head, plain_head)
    none, audio, visual = gradients.values()
    for (
        name,
        g,
    ) in none.items():  # what flows back through the audio end and through the visual end is everything
        assert torch.allclose((audio[name] - g) + (visual[name] - g), g, atol=1e-10), name
    own, other = "encoders.audio.layer4.1.conv2.weight", "encoders.visual.layer4.1.conv2.weight"
    # an exchange brings the other end's gradient as well
    assert torch.allclose(audio[own], 2 * none[own]) == (fusion != "mmtm")
    assert torch.allclose(audio[other], none[other]) == (fusion != "mmtm")


@pytest.mark.parametrize(("fusion", "leaks"), [("concat", False), ("mmtm", True), ("transformer", False)])
def test_absent_means_zero_features_at_the_end_so_that_an_exchange_before_it_remains(fusion, leaks):
    net, x = model("resnet18", fusion, CLIPS).eval(), batch(CLIPS)
    with torch.no_grad():
        before = net(x).unimodal["audio"]
        after = net(x | {"visual": x["visual"] + 1}).unimodal["audio"]
    assert torch.equal(before, after) != leaks


def test_cross_modal_transformer_reads_all_tokens():
    torch.manual_seed(0)
    fusion = CrossModalTransformer(["a", "b"], 16, 3).eval()
    tokens = {"a": torch.randn(2, 4, 16), "b": torch.randn(2, 7, 16)}
    out = fusion(tokens)
    assert out.shape == (2, 3)
    assert not torch.allclose(out, fusion(tokens | {"b": torch.zeros(2, 7, 16)}))


def test_swin_says_what_it_needs():
    try:
        import torchvision  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="torchvision"):
            model("swin", "concat", CLIPS)
    else:
        assert model("swin", "concat", CLIPS).eval()(batch(CLIPS)).fused.shape == (4, 3)


@pytest.mark.parametrize(
    ("encoder", "fusion", "shapes", "auxiliary"),
    [
        ("resnet18", "concat", WORDS, False),
        ("small", "mmtm", SMALL, False),
        ("small", "transformer", SMALL, False),
        ("resnet18", "transformer", CLIPS, True),
    ],
)
def test_models_that_make_no_sense_are_refused(encoder, fusion, shapes, auxiliary):
    with pytest.raises(ValueError, match=r"encoder|fusion|head"):
        model(encoder, fusion, shapes, auxiliary=auxiliary)


def test_the_third_variants_coefficients_and_gains():
    net, x, y = (
        model("small", "concat", SMALL, auxiliary=True).double().eval(),
        batch(SMALL),
        torch.tensor([0, 1, 2, 0]),
    )
    x = {name: value.double() for name, value in x.items()}
    criterion = SimpleMMLLoss(gamma=1.0, temperature=4.0)
    out = net(x)
    ratios = []
    for logits in out.unimodal.values():
        p = F.softmax(logits, 1)
        q = (1 / (-(p * p.log()).sum(1) + 1e-8)).mean()
        ratios.append(q / logits.abs().mean(0).sum())
    a = torch.softmax(4 * torch.stack(ratios), 0)
    assert torch.allclose(criterion.coefficients(list(out.unimodal.values())).double(), a, rtol=1e-5)
    got, _ = encoder_gradients(net, x, y, criterion)
    plain, _ = encoder_gradients(net, x, y, arl_fast.ARLLoss(rule="none"))
    for name, g in got.items():
        gain = 1 + a[0 if "image" in name else 1]
        assert torch.allclose(g, gain * plain[name], rtol=1e-5), name
    sure = [torch.tensor([[200.0, 0.0], [0.1, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])]
    # one certain row decides alone
    assert torch.equal(criterion.coefficients(sure), torch.tensor([1.0, 0.0]))


def test_the_auxiliary_head_is_apart_from_the_fused_one():
    net, x = model("small", "concat", SMALL, auxiliary=True).eval(), batch(SMALL)
    before = net(x)
    with torch.no_grad():
        net.head.auxiliary.weight.zero_()
    after = net(x)
    assert torch.equal(before.fused, after.fused)
    assert not torch.equal(before.unimodal["image"], after.unimodal["image"])


def test_methods_and_what_they_bring_along():
    two, three = methods(["audio", "visual"]), methods(["text", "audio", "vision"])
    assert "arl-paper" in two
    assert "arl-paper" not in three  # Eq. 18 is defined for two
    config = CONFIGS["crema-d"]
    assert list(select(["late"], ["audio", "visual"], config)) == ["alone:audio", "alone:visual", "late"]
    assert list(select(["arl", "joint"], ["audio", "visual"], config)) == ["joint", "arl"]
    assert select(["ladder"], ["audio", "visual"], config) == two
    tokens = dataclasses.replace(config, fusion="transformer")  # has no place for an auxiliary head
    assert set(two) - set(select(["ladder"], ["audio", "visual"], tokens)) == {
        "arl-simple-mml",
        "unimodal-auxiliary",
    }
    with pytest.raises(ValueError, match="expected ladder"):
        select(["ogm"], ["audio", "visual"], config)
    joint = two["joint"].loss(CONFIGS["crema-d"], 0, False)
    x, y = torch.randn(5, 6), torch.arange(5)
    assert torch.equal(joint((x, {"audio": x, "visual": x}), y), F.cross_entropy(x, y))
    assert two["arl"].loss(CONFIGS["crema-d"], 0, False).gamma == 4.0
    assert two["arl-reversed"].loss(CONFIGS["crema-d"], 0, False).temperature == -8.0
