"""The examples with packages of the index, MONAI, pytorch-widedeep and PyKale, where these can be imported.

Each trains once as the package does and once with rule "none" and gamma 0: the same losses and weights.
"""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import arl_fast
from arl_fast import ARLLoss

ROOT = Path(__file__).parents[1]


@pytest.fixture
def load(monkeypatch):
    """The module of an example, or a skip where its package is missing or does not load."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small models: several threads would only wait for each other

    def load(name, package):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module(package)
        except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision for another build of torch
            pytest.skip(f"{package} cannot be imported: {error}")
        return importlib.import_module(name)

    yield load
    torch.set_num_threads(threads)


def plain(**options):
    return ARLLoss(rule="none", gamma=0.0, **options)


def assert_same_weights(model, other):
    expected = other.state_dict()
    found = {name: x for name, x in model.state_dict().items() if name in expected}
    assert set(found) == set(expected)
    for name, x in found.items():
        assert torch.equal(x, expected[name]), name


# ---- MONAI -----------------------------------------------------------------------------------------------


def test_monai(load):
    areas = load("monai_image_table", "monai.networks.nets").main()
    assert min(areas.values()) > 0.75
    assert areas["both"] > 0.85


def test_monai_trains_as_before(load):
    """Without dropout, for which the passes of the modalities alone draw random numbers too."""
    example = load("monai_image_table", "monai.networks.nets")
    models, losses = [], []
    for kind, criterion in (
        (example.Classifier, nn.BCEWithLogitsLoss()),
        (example.Balanced, plain(task="multilabel")),
    ):
        torch.manual_seed(0)
        models.append(kind(dropout=0.0))
        losses.append(example.train(models[-1], criterion, epochs=1))
    assert losses[0] == losses[1]
    models[1].head = None  # it refers to the model's own layers
    assert_same_weights(models[1], models[0])


def test_monai_gains_reach_the_encoders(load):
    example = load("monai_image_table", "monai.networks.nets")
    batch = next(iter(example.DataLoader(example.patients(16), batch_size=16)))
    found = arl_fast.check(example.Balanced(), tuple(batch.values()), ARLLoss(task="multilabel"))
    assert found.ok
    assert None not in found.real.values()


# ---- pytorch-widedeep ------------------------------------------------------------------------------------


@pytest.fixture
def birds(load):
    return load("widedeep_birds", "pytorch_widedeep")


def test_widedeep(birds):
    results = birds.main(seeds=1, epochs=15, rates=(0.2,))
    assert set(results) == set(birds.METHODS)
    for ((accuracy, f1, precision),) in results.values():
        assert accuracy > 94  # 94.8 % of the pairs are a "no"
        assert f1 > 2
        assert precision > 20  # chance: 5


@pytest.mark.parametrize("objective", ["multitarget", "binary"])
def test_widedeep_trains_as_before(birds, objective):
    """19 labels with torch's loss; one label with the package's own."""
    train, test, sizes = birds.birds()
    labels = 19 if objective == "multitarget" else 1
    train = train | {"target": np.ascontiguousarray(train["target"][:, :labels])}
    predictions, models = [], []
    for ours in (False, True):
        torch.manual_seed(0)
        components = birds.components(sizes, labels)
        criterion = plain(task="multilabel")
        model = birds.Balanced(criterion, **components) if ours else birds.WideDeep(**components)
        own = nn.BCEWithLogitsLoss() if objective == "multitarget" else None
        torch.manual_seed(1)
        trainer = birds.fit(model, criterion if ours else own, train, 3, 0.1, objective)
        models.append(model)
        predictions.append(trainer.predict(X_wide=test["X_wide"], X_tab=test["X_tab"], batch_size=64))
        losses = trainer.history["train_loss"]
        assert losses[-1] < losses[0]
    assert_same_weights(models[1], models[0])
    assert np.array_equal(*predictions)


def tensors(rows):
    """What the Trainer makes of rows: inputs and target."""
    x = {
        "wide": torch.from_numpy(rows["X_wide"]),
        "deeptabular": [torch.from_numpy(part) for part in rows["X_tab"]],
    }
    return x, torch.from_numpy(rows["target"])


def test_widedeep_evaluates(birds):
    """The Trainer's validation calls the criterion on the fused logits alone, in evaluation mode."""
    train, test, sizes = birds.birds()
    test = birds.take(test, np.arange(320))  # ten whole batches: the mean of their means is that of the rows
    criterion = ARLLoss(task="multilabel")
    model = birds.Balanced(criterion, **birds.components(sizes))
    trainer = birds.fit(model, criterion, {"X_train": train, "X_val": test}, epochs=1, lr=0.1)
    x, target = tensors(test)
    with torch.no_grad():
        want = nn.functional.binary_cross_entropy_with_logits(model.eval()(x), target)
    assert trainer.history["val_loss"][0] == pytest.approx(float(want), rel=1e-5)


def test_widedeep_gains_reach_the_components(birds):
    train, _, sizes = birds.birds()
    criterion = ARLLoss(task="multilabel")
    model = birds.Balanced(criterion, **birds.components(sizes))
    found = arl_fast.check(
        model, tensors(train), criterion, step=lambda model, rows: (model(rows[0]), rows[1])
    )
    assert found.ok
    assert set(found.real) == {"place", "spectrum", "segments"}
    assert None not in found.real.values()


# ---- PyKale ----------------------------------------------------------------------------------------------


@pytest.fixture
def kale(load):
    return load("pykale_trainer", "kale.pipeline.base_nn_trainer")


@pytest.mark.filterwarnings("ignore")
def test_pykale(kale):
    found = kale.main(epochs=8)
    assert found["both"] > 0.6
    assert min(found.values()) > 0.3


@pytest.mark.filterwarnings("ignore")
def test_pykale_trains_as_before(kale):
    metrics, modules = [], []
    for kind, options in ((kale.MultimodalNNTrainer, {}), (kale.Balanced, {"objective": plain()})):
        torch.manual_seed(0)
        modules.append(kind(**kale.model_parts(), **options))
        trainer = kale.fit(modules[-1], epochs=2)
        metrics.append({k: float(v) for k, v in trainer.callback_metrics.items() if "epoch" in k})
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-6)
    assert set(metrics[0]) >= {"loss_epoch", "accuracy_epoch"}
    modules[1].objective = None
    assert_same_weights(modules[1], modules[0])


def test_pykale_gains_reach_the_encoders(kale):
    module = kale.Balanced(**kale.model_parts(), objective=ARLLoss())
    batch = kale.halves()[0][:32]

    def step(module, batch):
        return module.branches(
            [encode(x) for encode, x in zip(module.encoders, batch[:2], strict=True)]
        ), batch[2]

    found = arl_fast.check(module, batch, module.objective, step=step)
    assert found.ok
    assert None not in found.real.values()
