"""The ladder: paired and equal runs, choices on validation data only, rows that can be gone on from, numbers
of its tables.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import arl_fast
from arl_fast import ladder
from arl_fast.ladder import Batches, Budget, Data, Method, Results, climb, results, training
from arl_fast.ladder.methods import loss_options, methods, paper_swapped

ROOT = Path(__file__).parents[1]
NAMES = ["audio", "visual"]
OPTIONS = dict(progress=False)


class Net(nn.Module):
    def __init__(self, modalities=NAMES) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({m: nn.Linear(6, 8) for m in modalities})
        self.head = arl_fast.ConcatHead(dict.fromkeys(modalities, 8), 3)

    def forward(self, x):
        return self.head({m: e(x[m]).relu() for m, e in self.encoders.items()})


def rows_of(count, seed, modalities=NAMES):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (count,), generator=generator)
    centres = torch.randn(3, 6, generator=torch.Generator().manual_seed(9))
    return {
        m: centres[y] + (1 + i) * torch.randn(count, 6, generator=generator) for i, m in enumerate(modalities)
    }, y


def data(seed: int) -> Data:
    return Data(
        Batches(*rows_of(60, seed), 20), Batches(*rows_of(40, 100 + seed)), Batches(*rows_of(80, 200 + seed))
    )


def test_every_rung_is_there_and_starts_from_the_same_place():
    """With learning rate 0 all are the model of the seed: the same test numbers, zero differences."""
    out = climb(Net, data, Budget(1, (0.0,)), seeds=2, **OPTIONS)
    assert list(out.chosen) == [
        *("alone audio", "alone visual", "late", "joint", "unimodal", "weights", "constant", "share"),
        *("share_weights", "paper", "paper_swapped", "reversed", "rates"),
    ]
    named = ["joint", "ogm", "dgl", "blending"]
    family = climb(Net, data, Budget(3, (0.0,)), seeds=2, methods=named, **OPTIONS)
    assert list(family.chosen) == named
    out.chosen |= {name: family.chosen[name] for name in named}
    for name in ("unimodal", "constant", "share", "paper", "paper_swapped", "reversed", "rates", *named[1:]):
        assert out.difference(name).mean == 0
        assert out.chosen[name][0]["test"] == out.chosen["joint"][0]["test"]
    assert torch.equal(out.values("alone audio"), out.values("joint", "audio"))
    assert set(methods(["a", "b", "c"])) == set(methods(NAMES)) - {"paper", "paper_swapped"}


def test_joint_rung_is_a_plain_loop():
    """Written out again with torch's cross-entropy: the same accuracy, F1 and loss to the last bit of
    float32.
    """
    out = climb(Net, data, Budget(3, (0.1,)), seeds=[5], methods=["joint"], **OPTIONS)
    torch.manual_seed(5)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    (x, y), order = rows_of(60, 5), torch.Generator().manual_seed(5)
    for _ in range(3):
        for rows in torch.randperm(60, generator=order).split(20):
            loss = nn.functional.cross_entropy(model({m: v[rows] for m, v in x.items()}).fused, y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    x, y = rows_of(80, 205)
    logits = model(x).fused.detach()
    assert out.values("joint").item() == pytest.approx(
        float((logits.argmax(1) == y).double().mean()), abs=1e-9
    )
    assert out.values("joint", what="loss").item() == pytest.approx(
        float(nn.functional.cross_entropy(logits.double(), y)), abs=1e-5
    )
    sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    assert out.values("joint", what="macro_f1").item() == pytest.approx(
        sklearn.f1_score(y, logits.argmax(1), average="macro")
    )


def trained(step, epochs=3, seed=5, after=lambda model: None):
    """The state of a model after a plain loop, in which ``step(model, x, y)`` makes the gradients."""
    torch.manual_seed(seed)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    (x, y), order = rows_of(60, seed), torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(60, generator=order).split(20):
            optimizer.zero_grad()
            step(model, {m: v[rows] for m, v in x.items()}, y[rows])
            optimizer.step()
        after(model)
    return model.state_dict()


def trained_by_ladder(name, epochs=3, seed=5):
    setup = training.Setup(Net, training.sgd, training.forward, "cpu", {}, training.head_of)
    model, history = training.train(setup, methods(NAMES)[name], {}, data(seed), epochs, 0.1, seed)
    return {key.replace("head.head.", "head."): value for key, value in model.state_dict().items()}, history


def assert_same(states, wanted):
    assert states.keys() == wanted.keys()
    for name, value in states.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-5, msg=name)


def test_ogm_rung_is_its_formula():
    """Each encoder's gradient of the joint loss times 1 - tanh(0.1 rho), in a plain loop."""
    seen = []

    def step(model, x, y):
        out = model(x)
        nn.functional.cross_entropy(out.fused, y).backward()
        s = [float(u.detach().softmax(1)[torch.arange(len(y)), y].mean()) for u in out.unimodal.values()]
        for m, name in enumerate(NAMES):
            rho = s[m] / s[1 - m]
            seen.append(1 - math.tanh(0.1 * rho) if rho > 1 else 1)
            for p in model.encoders[name].parameters():
                p.grad *= seen[-1]

    states, history = trained_by_ladder("ogm")
    assert_same(states, trained(step))
    assert min(seen) < 1
    torch.testing.assert_close(
        history.series("gains").flatten(), torch.tensor(seen).double(), rtol=1e-4, atol=0
    )
    assert not history.rows()["saturated"].any()


def test_dgl_rung_routes_the_losses():
    """Encoders learn from the unimodal losses, the head from the fused one, in a plain loop."""

    def step(model, x, y):
        out = model(x)
        unimodal = sum(nn.functional.cross_entropy(u, y) for u in out.unimodal.values())
        encoders, head = list(model.encoders.parameters()), list(model.head.parameters())
        grads = torch.autograd.grad(unimodal, encoders, retain_graph=True)
        grads += torch.autograd.grad(nn.functional.cross_entropy(out.fused, y), head)
        for p, g in zip([*encoders, *head], grads, strict=True):
            p.grad = g

    assert_same(trained_by_ladder("dgl")[0], trained(step))

    options = dict(methods=["dgl"], head=lambda model: None, seeds=1, **OPTIONS)
    with pytest.raises(ValueError, match=r"head: found none in the model, or several, but \['dgl'\] wrap it"):
        climb(Net, data, Budget(1, (0.1,)), **options)


def test_blending_rung_is_its_formula():
    """From the second epoch on the losses have the weights of Gradient-Blending, times three."""
    weights, before, sums = [torch.ones(3)], [], []
    x_val, y_val = rows_of(40, 105)

    def losses(model, x, y):
        out = model(x)
        return torch.stack([nn.functional.cross_entropy(u, y) for u in (out.fused, *out.unimodal.values())])

    def step(model, x, y):
        loss = losses(model, x, y)
        sums.append(loss.detach())
        (weights[-1] * loss).sum().backward()

    def after(model):
        before.append((torch.stack(sums).mean(0), losses(model, x_val, y_val).detach()))
        sums.clear()
        if len(before) > 1:
            (t0, h0), (t1, h1) = before[0], before[-1]
            gained, overfitted = h0 - h1, (h1 - t1) - (h0 - t0)
            ratio = gained.clamp_min(0) / overfitted.abs().clamp_min(0.01) ** 2
            weights.append(3 * ratio / ratio.sum())

    wanted = trained(step, epochs=4, after=after)
    assert float(weights[-1].std()) > 0.1
    assert_same(trained_by_ladder("blending", epochs=4)[0], wanted)
    history = arl_fast.History()
    assert ladder.methods(NAMES)["blending"].weigh(history) is None
    with pytest.raises(ValueError, match=r"data: got no validation data, from which \['blending'\] weigh"):
        climb(
            Net,
            lambda seed: data(seed)._replace(validation=None),
            Budget(2, (0.1,)),
            seeds=1,
            methods=["blending"],
            **OPTIONS,
        )


def test_a_look_at_validation_data_does_not_change_the_training_batches():
    """Also where loaders draw from torch's global generator: only the weights make a difference."""
    (x, y), (x_val, y_val) = rows_of(30, 0), rows_of(20, 1)

    class Positional(Net):
        def forward(self, audio, visual):
            return super().forward({"audio": audio, "visual": visual})

    loaders = Data(
        DataLoader(TensorDataset(*x.values(), y), 10, shuffle=True),
        DataLoader(TensorDataset(*x_val.values(), y_val), 10),
        DataLoader(TensorDataset(*x_val.values(), y_val), 10),
    )
    wanted = {"unimodal": Method(dict(rule="none")), "look": Method(dict(rule="none"), weigh=lambda h: None)}
    out = climb(Positional, lambda seed: loaders, Budget(3, (0.1,)), seeds=1, methods=wanted, **OPTIONS)
    assert out.chosen["look"][0]["test"] == out.chosen["unimodal"][0]["test"]
    held_out = [h.rows("held_out")["step"].tolist() for name in wanted for h in out.history(name)]
    assert held_out == [[], [3, 6, 9]]


@pytest.mark.parametrize("classes", [2, 7])
def test_macro_f1_is_that_of_scikit_learn(classes):
    sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    for _ in range(5):
        prediction, target = torch.randint(classes, (9,)), torch.randint(classes, (9,))
        want = sklearn.f1_score(target, prediction, average="macro", zero_division=0)
        assert results.macro_f1(prediction, target, classes) == pytest.approx(want)


def test_alone_and_late_fusion_are_models_trained_apart():
    """ "alone" equals training a model whose only branch that is; late fusion adds their logits."""
    setup = training.Setup(Net, training.sgd, training.forward, "cpu", {}, training.head_of)
    d = data(0)
    trained = {
        m: training.train(setup, Method(dict(gamma=0.0, rule="none")), {}, d, 2, 0.1, 0, only=m)[0]
        for m in NAMES
    }
    x, y = rows_of(80, 200)
    total = sum(model(x).unimodal[m] for m, model in trained.items())
    out = climb(Net, data, Budget(2, (0.1,)), seeds=1, methods=["late"], **OPTIONS)
    assert out.values("late").item() == pytest.approx(float((total.argmax(1) == y).double().mean()))
    before = Net()
    torch.manual_seed(0)
    before = Net()
    assert torch.equal(trained["audio"].encoders["visual"].weight, before.encoders["visual"].weight)
    assert not torch.equal(trained["audio"].encoders["audio"].weight, before.encoders["audio"].weight)


def test_choices_are_made_on_validation_data_only():
    """A rate that is best on the test data but not on the validation data is not chosen, nor is such a
    variant.
    """
    rows = []
    for rate, validation, test in ((0.1, 0.6, 0.9), (0.2, 0.7, 0.5)):
        for seed in range(2):
            side = {"accuracy": validation, "macro_f1": 0.0, "loss": 1.0}
            rows.append(
                dict(
                    method="joint",
                    of="joint",
                    seed=seed,
                    rate=rate,
                    variant={},
                    validation={"fused": side},
                    test={"fused": side | {"accuracy": test}},
                )
            )
    out = Results(rows, NAMES)
    assert out.rate("joint") == 0.2
    assert out.values("joint").tolist() == [0.5, 0.5]
    weighted = [dict(row, method="weights") for row in rows]
    for row in weighted:
        row["validation"] = {"fused": {"accuracy": 1 - row["rate"], "loss": 1.0}}
    unimodal = [dict(row, method="unimodal") for row in rows]
    assert Results(weighted + unimodal, NAMES).rate("weights") == 0.2  # that of the models which they weight
    with pytest.raises(ValueError, match="data: got no validation data"):
        climb(
            Net,
            lambda seed: data(seed)._replace(validation=None),
            Budget(1, (0.1, 0.2)),
            seeds=1,
            methods=["joint"],
            **OPTIONS,
        )
    climb(
        Net,
        lambda seed: data(seed)._replace(validation=None),
        Budget(1, (0.1,)),
        seeds=1,
        methods=["joint"],
        **OPTIONS,
    )


def test_a_run_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    """Cut in the middle of a line: whole models are kept, the rest is trained again, and the rows are the
    same.
    """
    path = tmp_path / "rows.jsonl"
    arguments = (Net, data, Budget(1, (0.05, 0.1)))
    options = dict(seeds=2, methods=["late", "joint"], rows=path, **OPTIONS)
    whole = climb(*arguments, **options)
    text = path.read_text()
    assert len(text.splitlines()) == 2 * 2 * (3 + 1)
    path.write_text(text[: text.index('"alone visual"', len(text) // 2) + 5])
    trained = []
    train = training.train
    monkeypatch.setattr(training, "train", lambda *a, **k: trained.append(1) or train(*a, **k))
    again = climb(*arguments, **options)
    assert 0 < len(trained) < 12

    def comparable(rows):
        return sorted(
            json.dumps({k: v for k, v in row.items() if k != "seconds"}, sort_keys=True) for row in rows
        )

    assert comparable(again.rows) == comparable(whole.rows)
    assert comparable(ladder.load_rows(path)) == comparable(whole.rows)
    trained.clear()
    climb(*arguments, **options)
    assert not trained
    with pytest.raises(ValueError, match="has models of 1 epochs, but the budget says 2"):
        climb(Net, data, Budget(2, (0.1,)), **options)
    path.write_text("no json\n" + text)
    with pytest.raises(ValueError, match=r"rows\.jsonl: line 1 is no JSON object"):
        ladder.load_rows(path)


def test_table_and_differences_are_those_of_the_rows():
    rows = []
    for seed, (joint, share) in enumerate([(0.5, 0.6), (0.7, 0.7), (0.6, 0.8)]):
        for name, accuracy in (("joint", joint), ("share", share)):
            side = {
                b: {"accuracy": accuracy - 0.1 * i, "macro_f1": accuracy - 0.05, "loss": 1.0}
                for i, b in enumerate(["fused", *NAMES])
            }
            rows.append(dict(method=name, of=name, seed=seed, rate=0.1, variant={}, test=side))
    out = Results(rows, NAMES)
    d = out.difference("share")
    assert d.mean == pytest.approx(0.1)
    assert d.error == pytest.approx(0.1 / math.sqrt(3))
    assert not d.clear
    lines = out.table().splitlines()
    assert lines[1].split("  ")[0] == "joint cross-entropy"
    assert "70.0 ± 10.0  +10.0 ± 5.8  65.0 ± 10.0  60.0 ± 10.0" in lines[2]
    assert out.table(markdown=True).splitlines()[1].startswith("| --- |")
    assert results.Difference(0.1, 0.02, 3).clear
    assert not results.Difference(0.1, float("nan"), 1).clear
    with pytest.raises(KeyError, match="method: got 'paper', expected one of"):
        out.values("paper")


def test_rows_that_all_seeds_were_tested_on_add_to_the_error():
    """With equal seeds nothing is left but the rows' part, which is that of McNemar's test."""
    right = {"joint": torch.rand(500) < 0.5, "share": torch.rand(500) < 0.6}
    rows = []
    for seed in range(2):
        for name, bits in right.items():
            test = {"fused": {"accuracy": float(bits.double().mean())}}
            rows.append(
                dict(
                    method=name,
                    of=name,
                    seed=seed,
                    rate=0.1,
                    variant={},
                    test=test,
                    correct=results.bits_to_hex(bits),
                )
            )
    assert torch.equal(results.row_scores(rows[0]["correct"]), right["joint"].double())
    d = Results(rows, NAMES).difference_with_rows("share", "joint")
    gained = float((right["share"] & ~right["joint"]).sum())
    lost = float((right["joint"] & ~right["share"]).sum())
    assert d.mean == pytest.approx((gained - lost) / 500)
    assert d.error == pytest.approx(math.sqrt((gained + lost - (gained - lost) ** 2 / 500) / 500 / 499))


def test_fixed_gains_are_learning_rates_under_sgd():
    """Gains (2, 0.5) are the step of an optimizer with twice and half the learning rate for the encoders."""
    states = []
    for gains, factors in (([2.0, 0.5], (1.0, 1.0)), ([1.0, 1.0], (2.0, 0.5))):
        torch.manual_seed(0)
        model = Net()
        groups = [
            {"params": e.parameters(), "lr": 0.1 * f}
            for e, f in zip(model.encoders.values(), factors, strict=True)
        ]
        optimizer = torch.optim.SGD([*groups, {"params": model.head.parameters(), "lr": 0.1}], momentum=0.9)
        criterion = arl_fast.ARLLoss(**loss_options(Method({}), {"gains": gains}))
        for i in range(3):
            x, y = rows_of(20, i)
            loss = criterion(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        states.append(model.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], msg=name)
    assert criterion.stats.gains.tolist() == [1.0, 1.0]


def test_paper_rule_in_the_other_order():
    """The rule on exchanged modalities, exchanged back."""
    x = [torch.randn(6, 4, dtype=torch.float64) for _ in range(3)]
    y = torch.randint(4, (6,))
    swapped = arl_fast.arl_loss(x[0], [x[1], x[2]], y, rule=paper_swapped)[1]
    other = arl_fast.arl_loss(x[0], [x[2], x[1]], y, rule="paper")[1]
    torch.testing.assert_close(swapped.coefficients, other.coefficients.flip(0))


def test_loaders_and_batches_of_other_forms():
    """A DataLoader with its own generator is as paired as one without; dict batches go by name."""
    (x, y), wanted = rows_of(30, 0), []
    dataset = TensorDataset(x["audio"], x["visual"], y)

    class Positional(Net):
        def forward(self, audio, visual):
            return super().forward({"audio": audio, "visual": visual})

    loader = DataLoader(dataset, 10, shuffle=True, generator=torch.Generator().manual_seed(3))
    for _ in range(2):
        d = Data(loader, None, DataLoader(dataset, 10))
        out = climb(
            Positional,
            lambda seed, d=d: d,
            Budget(2, (0.1,)),
            seeds=[1],
            methods=["joint", "constant"],
            **OPTIONS,
        )
        wanted.append(out.values("joint", what="loss").item())
    assert wanted[0] == wanted[1]
    batch = {"audio": x["audio"], "visual": x["visual"], "labels": y}
    output, target = training.forward(Positional(), batch)
    assert target is y
    assert output.fused.shape == (30, 3)
    with pytest.raises(ValueError, match=r"batch: got a dict with the keys \['audio'\]"):
        training.forward(Positional(), {"audio": y})
    with pytest.raises(TypeError, match="batch: got Tensor"):
        training.forward(Positional(), y)
    with pytest.raises(
        ValueError, match=r"x\['audio'\]: got 30 rows, expected as many as there are targets, 2"
    ):
        Batches(x, y[:2])
    with pytest.raises(ValueError, match=r"methods: got \['paper'\], expected some of"):
        climb(
            lambda: Net(["a", "b", "c"]),
            lambda seed: Data(Batches(*rows_of(9, 0, "abc"), 3), None, ()),
            Budget(1, (0.1,)),
            methods=["paper"],
        )


def test_fusion_weights_are_fitted_on_the_validation_rows(monkeypatch):
    """Of the models with unimodal losses; the row "weights" has their predictions, and "unimodal" stays what
    it was.
    """
    seen = []

    class Weights:
        weights = torch.tensor([0.0, 1.0])

        @classmethod
        def fit(cls, head, out, target):
            seen.append((type(head), out.fused.shape, list(out.unimodal), target.shape))
            return cls()

        def __call__(self, out):
            return out.unimodal["visual"]

    plain = climb(Net, data, Budget(1, (0.1,)), seeds=1, methods=["unimodal"], **OPTIONS)
    weights = list(plain.chosen["weights"][0]["weights"].values())
    assert len(weights) == 2
    assert min(weights) > 0
    monkeypatch.setattr(training, "FusionWeights", Weights)
    out = climb(Net, data, Budget(1, (0.1,)), seeds=1, methods=["unimodal"], **OPTIONS)
    assert seen == [(arl_fast.ConcatHead, (40, 3), NAMES, (40,))]
    assert torch.equal(out.values("weights"), out.values("unimodal", "visual"))
    assert torch.equal(out.values("unimodal"), plain.values("unimodal"))
    assert out.chosen["weights"][0]["weights"] == {"audio": 0.0, "visual": 1.0}


def test_ignored_rows_are_not_measured():
    logits, y = {"fused": torch.eye(3)}, torch.tensor([0, -100, 1])
    measured, bits = results.measure(logits, y)
    assert measured["fused"]["accuracy"] == 0.5
    assert bits == "2:01"
    with pytest.raises(ValueError, match="target: got no row to measure"):
        results.measure(logits, torch.full((3,), -100))


def test_labels_are_measured_as_scikit_learn_does():
    """Over what is known; the rows' scores give the accuracy, and unknown labels add nothing."""
    sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    x, target = torch.randn(40, 5), (torch.rand(40, 5) < 0.3).float()
    measured, correct = results.measure_labels({"fused": x, "audio": -x}, target)
    yes = (x > 0).int()
    for name, prediction in (("fused", yes), ("audio", 1 - yes)):
        want = sklearn.f1_score(target, prediction, average="macro", zero_division=0)
        assert measured[name]["macro_f1"] == pytest.approx(want)
        assert measured[name]["accuracy"] == pytest.approx(float((prediction == target).double().mean()))
    torch.testing.assert_close(results.row_scores(correct), (yes == target).double().mean(1))
    target[::3, 1:] = torch.nan
    measured, correct = results.measure_labels({"fused": x}, target)
    known = ~target.isnan()
    right = (yes == target)[known].double().mean()
    assert measured["fused"]["accuracy"] == pytest.approx(float(right))
    torch.testing.assert_close(results.row_scores(correct).mean(), right)
    want = nn.functional.binary_cross_entropy_with_logits(x[known], target[known])
    assert measured["fused"]["loss"] == pytest.approx(float(want), rel=1e-5)
    f1 = [sklearn.f1_score(target[known[:, c], c], yes[known[:, c], c]) for c in range(5)]
    assert measured["fused"]["macro_f1"] == pytest.approx(sum(f1) / 5)
    with pytest.raises(ValueError, match="target: got no label to measure"):
        results.measure_labels({"fused": x}, target * torch.nan)


def labelled(seed: int) -> Data:
    """Three labels per row, some of them not known."""

    def side(count, seed, size=None):
        x, y = rows_of(count, seed)
        labels = torch.stack([y == 0, y > 0, (y == 2) ^ (x["audio"][:, 0] > 1)], 1).float()
        labels[::7, 1] = torch.nan
        return Batches(x, labels, size)

    return Data(side(60, seed, 20), side(40, 100 + seed), side(80, 200 + seed))


def test_several_labels_per_row():
    """Models learn their labels; the joint rung is torch's binary cross-entropy; fusion weights fit it."""
    out = climb(Net, labelled, Budget(4, (0.1,)), seeds=2, criterion={"task": "multilabel"}, **OPTIONS)
    assert min(out.chosen["share_weights"][0]["weights"].values()) > 0
    assert {"alone audio", "late", "joint", "unimodal", "share", "paper", "rates"} <= set(out.chosen)
    x, labels = labelled(0).test.x, labelled(0).test.y
    frequent = torch.maximum(labels.nanmean(0), 1 - labels.nanmean(0)).mean()
    assert out.values("share").min() > float(frequent)  # of each label's more frequent answer
    row = out.chosen["joint"][0]
    assert results.row_scores(row["correct"]).mean().item() == pytest.approx(row["test"]["fused"]["accuracy"])
    assert out.difference_with_rows("share", "joint").error >= out.difference("share").error

    torch.manual_seed(0)
    model, order = Net(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train = labelled(0).train
    for _ in range(4):
        for rows in torch.randperm(60, generator=order).split(20):
            y = train.y[rows]
            fused = model({m: v[rows] for m, v in train.x.items()}).fused
            optimizer.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(fused[~y.isnan()], y[~y.isnan()]).backward()
            optimizer.step()
    known = ~labels.isnan()
    with torch.no_grad():
        loss = nn.functional.binary_cross_entropy_with_logits(model(x).fused[known], labels[known])
    assert row["test"]["fused"]["loss"] == pytest.approx(float(loss), rel=1e-4)


def test_without_tqdm_it_runs_in_silence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    climb(Net, data, Budget(1, (0.1,)), seeds=1, methods=["joint"])
    assert capsys.readouterr().err == ""


def test_data_are_made_once_for_each_seed():
    asked = []
    climb(
        Net,
        lambda seed: asked.append(seed) or data(seed),
        Budget(1, (0.1, 0.2)),
        seeds=2,
        methods=["joint", "share"],
        **OPTIONS,
    )
    assert asked == [0, 1]


def test_an_output_with_a_mask_is_refused_before_training():
    """Tables of branches that are judged on different rows would compare nothing."""

    class Masked(Net):
        def forward(self, x):
            x = {m: e(x[m]).relu() for m, e in self.encoders.items()}
            return self.head(x, torch.ones(len(x["audio"]), 2, dtype=torch.bool))

    with pytest.raises(ValueError, match="forward: got an output with a mask of absent modalities"):
        climb(Masked, data, Budget(1, (0.1,)), 1, ["joint"], **OPTIONS)
