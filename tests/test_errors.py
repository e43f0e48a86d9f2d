"""Bad input raises, and the message names the argument, what came and what was expected."""

from __future__ import annotations

import pytest
import torch

import arl_fast
from arl_fast import ARLLoss, BranchLogits, arl_loss, modulate

X, Y = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])


def call(fused=X, unimodal=(X, X), target=Y, **options):
    return arl_loss(fused, unimodal, target, **options)


CASES = {
    "fused type": (dict(fused=[1, 2]), TypeError, r"fused: got list, expected a Tensor"),
    "fused dtype": (dict(fused=X.long()), TypeError, r"fused: got dtype torch.int64, expected floating"),
    "fused shape": (dict(fused=X[0]), ValueError, r"fused: got shape \[3\], expected \[B, C\]"),
    "no classes": (dict(fused=X[:, :0]), ValueError, r"fused: got shape \[4, 0\]"),
    "unimodal type": (dict(unimodal=X), TypeError, r"unimodal: got Tensor, expected a dict or a sequence"),
    "unimodal empty": (dict(unimodal=[]), ValueError, r"unimodal: got no logits"),
    "unimodal entry": (dict(unimodal={"a": 3}), TypeError, r"unimodal\['a'\]: got int, expected a Tensor"),
    "unimodal shape": (
        dict(unimodal={"a": X[:2]}),
        ValueError,
        r"unimodal\['a'\]: got shape \[2, 3\], expected .* \[4, 3\]",
    ),
    "unimodal dtype": (
        dict(unimodal=[X, X.double()]),
        TypeError,
        r"unimodal\[1\]: got dtype torch.float64, expected .*float32",
    ),
    "unimodal device": (
        dict(unimodal=[X.to("meta")]),
        ValueError,
        r"unimodal\[0\]: got device meta, expected .* cpu",
    ),
    "link dtype": (dict(link=torch.zeros(2, dtype=torch.int64)), TypeError, r"link: got dtype torch.int64"),
    "target type": (dict(target=[0, 1, 2, 0]), TypeError, r"target: got list, expected a Tensor"),
    "target shape": (
        dict(target=Y[:2]),
        ValueError,
        r"target: got class indices of shape \[2\], expected \[4\]",
    ),
    "target dtype": (
        dict(target=Y.to(torch.int16)),
        TypeError,
        r"target: got dtype torch.int16, expected int64 or int32",
    ),
    "target floats": (
        dict(target=Y.float()),
        TypeError,
        r"target: got dtype torch.float32 in the shape of class .*: pass integers",
    ),
    "target probabilities": (
        dict(target=torch.rand(4, 2)),
        ValueError,
        r"target: got probabilities of shape \[4, 2\], expected \[4, 3\]",
    ),
    "several labels": (
        dict(target=torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 1, 1], [1, 0, 0]])),
        ValueError,
        r"target: got probabilities that sum to 2 \(row 2\), expected .* 1 .*task='multilabel'",
    ),
    "no label": (
        dict(target=torch.zeros(4, 3)),
        ValueError,
        r"target: got probabilities that sum to 0 \(row 0\)",
    ),
    "NaN among probabilities": (
        dict(target=torch.tensor([[1.0, 0, 0]] * 3 + [[torch.nan, 0, 1]])),
        ValueError,
        r"target: got probabilities that sum to nan \(row 3\)",
    ),
    "several labels as integers": (
        dict(target=torch.ones(4, 3).long()),
        ValueError,
        r"target: got class indices of shape \[4, 3\], .*target.float\(\) and task='multilabel'",
    ),
    "target grad": (dict(target=torch.rand(4, 3, requires_grad=True)), ValueError, r"target: .*require grad"),
    "target device": (dict(target=Y.to("meta")), ValueError, r"target: got device meta"),
    "target range": (
        dict(target=torch.tensor([0, 1, 2, 3])),
        IndexError,
        r"target: got class 3, expected 0 <= target < 3",
    ),
    "link type": (dict(link=3), TypeError, r"link: got int, expected .*modulate"),
    "link shape": (dict(link=torch.zeros(3)), ValueError, r"link: got shape \[3\], expected \[2\]"),
    "link device": (dict(link=torch.zeros(2, device="meta")), ValueError, r"link: got device meta"),
    "mask type": (dict(mask=[[True]]), TypeError, r"mask: got list, expected a bool Tensor \[B, M\]"),
    "mask dtype": (dict(mask=torch.ones(4, 2)), TypeError, r"mask: got dtype torch.float32, expected bool"),
    "mask shape": (
        dict(mask=torch.ones(4, 3, dtype=torch.bool)),
        ValueError,
        r"mask: got shape \[4, 3\], expected \[B, M\] = \[4, 2\]",
    ),
    "weight type": (dict(weight=[1.0]), TypeError, r"weight: got list"),
    "weight dtype": (
        dict(weight=torch.ones(3, dtype=torch.int64)),
        TypeError,
        r"weight: got dtype torch.int64",
    ),
    "weight shape": (
        dict(weight=torch.ones(4)),
        ValueError,
        r"weight: got shape \[4\], expected \[C\] = \[3\]",
    ),
    "weight device": (dict(weight=torch.ones(3, device="meta")), ValueError, r"weight: got device meta"),
    "gamma range": (dict(gamma=-1.0), ValueError, r"gamma: got -1.0, expected a finite number >= 0"),
    "gamma nan": (dict(gamma=float("nan")), ValueError, r"gamma: got nan"),
    "gamma type": (
        dict(gamma="4"),
        TypeError,
        r"gamma: got str '4', expected a number, one per modality, or a tensor",
    ),
    "gamma shape": (dict(gamma=torch.ones(2, 1)), ValueError, r"gamma: got a tensor of shape \[2, 1\]"),
    "gamma number": (
        dict(gamma=[1.0, 2.0, 3.0]),
        ValueError,
        r"gamma: got 3 values, expected .* 2 modalities",
    ),
    "gamma vector": (dict(gamma=torch.ones(3)), ValueError, r"gamma: got 3 values, expected .* 2 modalities"),
    "gamma entry": (
        dict(gamma=[1.0, -2.0]),
        ValueError,
        r"gamma\[1\]: got -2.0, expected a finite number >= 0",
    ),
    "gamma grad": (dict(gamma=torch.ones((), requires_grad=True)), ValueError, r"gamma: .*requires grad"),
    "temperature": (
        dict(temperature=float("inf")),
        ValueError,
        r"temperature: got inf, expected a finite number",
    ),
    "rule": (
        dict(rule="share "),
        ValueError,
        r"rule: got 'share ', expected one of 'share', 'paper', 'constant', 'none', 'ogm' or a callable",
    ),
    "rule paper": (dict(rule="paper", unimodal=[X]), ValueError, r"rule: 'paper' .* two modalities, got 1"),
    "rule result": (
        dict(rule=lambda s: 1.0),
        ValueError,
        r"rule: the callable returned float, expected coefficients of shape \[2\]",
    ),
    "dependence": (
        dict(dependence="l1"),
        ValueError,
        r"dependence: got 'l1', expected one of 'confidence', 'logit_l1'",
    ),
    "gain": (dict(gain=1), ValueError, r"gain: got 1, expected one of"),
    "reduction": (dict(reduction="avg"), ValueError, r"reduction: got 'avg'"),
    "floor": (
        dict(entropy_floor=1.5),
        ValueError,
        r"entropy_floor: got 1.5, expected a number in \[0.0, 1.0\]",
    ),
    "floor type": (dict(entropy_floor="0.3"), TypeError, r"entropy_floor: got str"),
    "smoothing": (dict(label_smoothing=-0.1), ValueError, r"label_smoothing: got -0.1"),
    "ignore_index": (dict(ignore_index=None), TypeError, r"ignore_index: got NoneType"),
}


@pytest.mark.parametrize("name", CASES)
def test_arl_loss(implementation, name):
    arguments, error, message = CASES[name]
    with pytest.raises(error, match=message):
        call(**arguments)


ARGUMENTS = {  # which ARLLoss does not have
    "implementation": (
        dict(implementation="reference"),
        TypeError,
        r"implementation: got 'reference', expected an object with the functions of docs/architecture.md",
    ),
    "warming number": (dict(warming=-1), TypeError, r"warming: got -1, expected a bool or a 0-d tensor"),
    "warming shape": (
        dict(warming=torch.tensor([True])),
        TypeError,
        r"warming: got shape \[1\], expected a bool or a 0-d tensor",
    ),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_of_the_function_alone(implementation, name):
    arguments, error, message = ARGUMENTS[name]
    with pytest.raises(error, match=message):
        call(**arguments)


@pytest.mark.parametrize("name", CASES)
def test_the_module_says_the_same(implementation, name):
    arguments, error, message = CASES[name]
    arguments = dict(fused=X, unimodal=(X, X), target=Y, link=None) | arguments
    output = BranchLogits(arguments.pop("fused"), arguments.pop("unimodal"), arguments.pop("link"))
    target, mask = arguments.pop("target"), arguments.pop("mask", None)
    with pytest.raises(error, match=message):
        ARLLoss(**arguments)(output, target, mask)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (X, r"output: got Tensor, expected BranchLogits"),
        ((X, X, X), r"output: got a tuple of 3: \(Tensor, Tensor, Tensor\), expected BranchLogits"),
        ((X,), r"output: got a tuple of 1"),
    ],
)
def test_output(output, message):
    with pytest.raises(TypeError, match=message):
        ARLLoss()(output, Y)


def test_output_dict_without_fused():
    with pytest.raises(ValueError, match=r"output: got a dict with the keys \['audio'\], expected \"fused\""):
        ARLLoss()({"audio": X}, Y)


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        (X, TypeError, r"features: got Tensor, expected a dict or a sequence"),
        ({}, ValueError, r"features: got none"),
        ({"a": 1}, TypeError, r"features\['a'\]: got int"),
        ([X.long()], TypeError, r"features\[0\]: got dtype torch.int64"),
        ([X, X.to("meta")], ValueError, r"features\[1\]: got device meta"),
    ],
)
def test_modulate(features, error, message):
    with pytest.raises(error, match=message):
        modulate(features)


@pytest.mark.parametrize("warmup", [-1, 1.5, True, None])
def test_warmup(warmup):
    with pytest.raises(ValueError, match=r"warmup: got .*, expected a number of steps >= 0"):
        ARLLoss(warmup=warmup)


def test_presets():
    with pytest.raises(ValueError, match=r"dataset: got 'vggsound', expected one of 'crema-d'"):
        ARLLoss.paper("vggsound")
    with pytest.raises(ValueError, match=r"dataset: got 'mosi'.*ARLLoss.release"):
        ARLLoss.release("mosi")


def test_heads():
    head = arl_fast.ConcatHead({"a": 3, "b": 2}, 4)
    with pytest.raises(
        ValueError, match=r"features: got a dict with the keys \['a'\], expected .* \['a', 'b'\]"
    ):
        head({"a": X})
    with pytest.raises(ValueError, match=r"features\['b'\]: got shape \[4, 3\], expected \[B, 2\]"):
        head({"a": X, "b": X})
    with pytest.raises(ValueError, match=r"features: got a Tensor"):
        head(X)
    with pytest.raises(ValueError, match=r"features: got list of 1, expected a sequence of 2"):
        arl_fast.SumHead([3, 2], 4)([X])
    with pytest.raises(ValueError, match=r"bias: got 'half'"):
        arl_fast.ConcatHead([3], 4, bias="half")
    with pytest.raises(ValueError, match=r"features\['a'\]: got 0, expected a feature size >= 1"):
        arl_fast.ConcatHead({"a": 0}, 4)
    with pytest.raises(TypeError, match=r"features: got 3"):
        arl_fast.SumHead(3, 4)
    with pytest.raises(ValueError, match=r"SharedHead needs one feature size"):
        arl_fast.SharedHead([3, 2], 4)
    with pytest.raises(ValueError, match=r"GatedHead is defined for two modalities, got 3"):
        arl_fast.GatedHead([3, 3, 3], 4)
    with pytest.raises(ValueError, match=r"gate: got 'c', expected one of \['a', 'b'\]"):
        arl_fast.GatedHead({"a": 3, "b": 3}, 4, gate="c")
    with pytest.raises(ValueError, match=r"BilinearHead is defined for two modalities, got 1"):
        arl_fast.BilinearHead([3], 4)
    with pytest.raises(TypeError, match=r"fusion: got int"):
        arl_fast.ZeroedHead(3)


# ---- class probabilities --------------------------------------------------------------------------------


def smoothed(y, classes, smoothing=0.1, dtype=torch.float32):
    """Label smoothing as image trainers write it out."""
    off = smoothing / classes
    return torch.full((len(y), classes), off, dtype=dtype).scatter_(1, y[:, None], 1 - smoothing + off)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("classes", [2, 7, 309, 20000])
def test_rounded_probabilities_pass(dtype, classes):
    """What smoothing, mixup, CutMix and a teacher's softmax give sums to 1 but for rounding."""
    y = torch.randint(classes, (32,))
    soft, one_hot = smoothed(y, classes, dtype=dtype), torch.nn.functional.one_hot(y, classes).to(dtype)
    share = torch.rand(32, 1).to(dtype)
    targets = [
        soft,
        0.3 * soft + 0.7 * soft.flip(0),  # mixup: one share for the batch
        share * one_hot + (1 - share) * one_hot.flip(0),  # or one for each row, as CutMix
        torch.softmax(3 * torch.randn(32, classes, dtype=torch.float32), 1).to(dtype),
        torch.softmax(torch.randn(32, classes).to(dtype), 1),
        smoothed(y, classes, -0.2, dtype),  # smoothing below 0
    ]
    x = torch.randn(32, classes)
    for target in targets:
        loss, _ = arl_loss(x, [x], target, rule="none")
        want = 2 * torch.nn.functional.cross_entropy(x, target.float())
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)


def test_sums_run_over_the_classes_of_dense_targets():
    x = torch.randn(2, 3, 5)
    target = torch.softmax(torch.randn(2, 3, 5), 1)
    arl_loss(x, [x], target, rule="none")
    target[1, :, 4] *= 1.5
    with pytest.raises(ValueError, match=r"sum to 1.5 \(row 1\)"):
        arl_loss(x, [x], target, rule="none")
    arl_loss(x[:0], [x[:0]], target[:0], rule="none")


def test_linear_loss_looks_at_the_sums_too():
    head = arl_fast.ConcatHead([4, 4], 3)
    features = [torch.randn(5, 4), torch.randn(5, 4)]
    with pytest.raises(ValueError, match=r"sum to 3 .*multilabel"):
        head.loss(features, torch.ones(5, 3))


def test_a_wrong_type_is_an_error_whatever_came_before():
    """0 == False, but only one of them is a number."""
    ARLLoss(label_smoothing=0, ignore_index=-77)
    with pytest.raises(TypeError, match="label_smoothing: got bool False"):
        ARLLoss(label_smoothing=False, ignore_index=-77)
