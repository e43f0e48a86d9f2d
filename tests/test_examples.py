"""Every example runs, on a few batches, and learns; the adapter does what its library expects."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import miniatures
import pytest
import torch
from processes import WITHOUT_TEARDOWN

import arl_fast
from arl_fast.integrations.huggingface import compute_loss_func

ROOT = Path(__file__).parents[1]
CHANCE = 1 / 6


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module


@pytest.mark.parametrize(
    "options", [{}, {"precision": "bf16"}, {"precision": "fp16", "accumulate": 2}], ids=str
)
def test_plain(example, options):
    assert example("plain").main(**options) > 4 * CHANCE


@pytest.fixture
def short(example, monkeypatch):
    """An example that runs the ladder, with few epochs."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")

    def load(name, epochs):
        module = example(name)
        monkeypatch.setattr(module, "BUDGET", module.BUDGET._replace(epochs=epochs))
        return module

    return load


def test_demo(short, tmp_path, capsys):
    """Both tables, with fusion weights and their control; the picture; a line for every model's result."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    picture, rows = tmp_path / "demo.png", tmp_path / "rows.jsonl"
    short("demo", 2).main(["--seeds", "2", "--out", str(picture), "--rows", str(rows)])
    clean, noisy = capsys.readouterr().out.split("The same with a noisy right half")
    for title in ("left alone", "late fusion", "+ unimodal losses", "ARL, fusion weights"):
        assert f"\n{title}  " in clean
    for text in (clean, noisy):
        assert "\nARL, validation rows trained on minus ARL (share rule): " in text
    assert picture.stat().st_size > 10_000
    kept = [json.loads(line) for line in rows.read_text().splitlines()]
    assert len(kept) == 2 * (10 + 4)
    assert {(row["example"], row["noise"]) for row in kept} == {("demo", 0.0), ("demo", 1.0)}
    assert len(next(row for row in kept if row["method"] == "share_weights")["weights"]) == 2


def test_av_digits(example, tmp_path, monkeypatch, capsys):
    """On a miniature of the real files; each method has chosen one of two learning rates."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    miniatures.av_digits(tmp_path)
    module = example("av_digits")
    monkeypatch.setattr(module, "BUDGET", module.BUDGET._replace(epochs=1))
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path), "--seeds", "1", "--out", str(tmp_path / "a.png")])
    module.main()
    assert "\nvisual alone  " in capsys.readouterr().out
    assert (tmp_path / "a.png").exists()


def test_fusion_guard(short):
    """A guard keeps less than none does; the gates keep all or nothing."""
    module = short("fusion_guard", 15)
    head, out, y = module.model("halves, noise 1.2", 0)
    gains = module.judge(head, out, y, torch.arange(50), torch.arange(200, len(y)))
    assert 0 < gains["shrink 2"] <= gains["shrink 1"] <= gains["none"] + 1
    assert gains["gate at r < 0.75"] in (0, gains["none"])


def test_gamma_by_modality(short, monkeypatch, capsys):
    """The held-out half that is noisy gets the smaller gamma, and the models learn."""
    module = short("gamma_by_modality", 15)
    noisy = "halves, noise 1.2"
    monkeypatch.setattr(module, "SETTINGS", {noisy: module.SETTINGS[noisy]})
    weights = []
    for name, recipe in list(module.RECIPES.items())[1:]:

        def ask(history, weigh=recipe.weigh):
            weights.append(weigh(history))
            return weights[-1]

        monkeypatch.setitem(module.RECIPES, name, recipe._replace(weigh=ask))
    module.main(["--seeds", "1"])
    assert len(weights) == 2 * 15
    own, kept = weights[14], weights[29]
    assert own[:2].tolist() == [1, 1]
    assert own[2] < 0.9
    assert kept[1:].sum().item() == pytest.approx(2)
    assert float(capsys.readouterr().out.split("gamma 1: ")[1].split(";")[0]) > 60


def test_timm_style(example):
    assert example("timm_style").main() > 4 * CHANCE


def test_ddp():
    """As its first line says, on two processes; it checks itself that all processes see the same."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "0",
        "--standalone",
    ]
    command += ["--no-python", sys.executable, "-c", WITHOUT_TEARDOWN, str(ROOT / "examples" / "ddp.py")]
    path = os.pathsep.join([str(ROOT), str(ROOT / "examples"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    assert "epoch 1: loss" in run.stdout
    assert "rows 64" in run.stdout


def test_lightning(example):
    pytest.importorskip("lightning", reason="lightning is not installed")
    module, metrics = example("lightning_module").main()
    assert metrics["accuracy/fused"] > 4 * CHANCE
    assert int(module.criterion.steps) == 16  # every training batch, no validation batch
    assert metrics["gain/audio"] > 1


def test_lightning_resumes_in_mid_warmup(example, tmp_path):
    """The counter is in the checkpoint."""
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")
    lightning_module = example("lightning_module")
    module = lightning_module.ARLModule()
    module.criterion.steps.fill_(3)
    trainer = lightning.Trainer(
        max_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "state.ckpt", weights_only=True)
    again = lightning_module.ARLModule.load_from_checkpoint(tmp_path / "state.ckpt")
    assert int(again.criterion.steps) == 3


def test_hf_trainer(example):
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(gains|link).*")  # AdamW, and every gain acts
        trainer, metrics = example("hf_trainer").main()
    group = trainer.model.criterion.stats.gains
    assert (group > 1).all()
    assert metrics["eval_accuracy"] > 4 * CHANCE
    # two micro-batches for each of 24 steps, none for evaluation
    assert int(trainer.model.criterion.steps) == 48
    assert 0 < metrics["eval_loss"] < 6


def test_hf_accumulation_equals_one_batch(example):
    """Two micro-batches of 16, divided by the 32 items in both, are the gradients of one batch of 32
    (constant rule).
    """
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    hf_trainer = example("hf_trainer")
    states = []
    for size, accumulate in ((32, 1), (16, 2)):
        torch.manual_seed(0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                hf_trainer.arl_fast,
                "ARLLoss",
                lambda **options: arl_fast.loss.ARLLoss(reduction="sum", rule="constant"),
            )
            options = {
                "per_device_train_batch_size": size,
                "gradient_accumulation_steps": accumulate,
                "make": torch.optim.SGD,
                "max_grad_norm": 0.0,
            }
            trainer, _ = hf_trainer.main(steps=3, rows=96, **options)
        states.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
    for name, p in states[0].items():
        torch.testing.assert_close(p, states[1][name], msg=name)


def test_hf_adapter():
    """Sum over the micro-batch divided by the Trainer's count; the count has no influence on the
    coefficients.
    """
    criterion = arl_fast.ARLLoss(reduction="sum")
    loss = compute_loss_func(criterion)
    head = arl_fast.ConcatHead({"audio": 4, "visual": 4}, 3)
    features = {"audio": torch.randn(5, 4), "visual": torch.randn(5, 4)}
    out = head(features)
    labels = torch.tensor([0, 1, 2, -100, 1])
    outputs = {"loss": torch.zeros(()), "fused": out.fused, **out.unimodal, "link": out.link}
    mean = arl_fast.ARLLoss()
    expected = mean(out, labels)
    torch.testing.assert_close(loss(outputs, labels), expected)
    for items in (8, torch.tensor(8)):
        torch.testing.assert_close(loss(outputs, labels, num_items_in_batch=items), expected / 2)
        torch.testing.assert_close(criterion.stats.gains, mean.stats.gains)
    with pytest.raises(ValueError, match="criterion: got reduction='mean', expected 'sum'"):
        compute_loss_func(mean)


def test_hf_gains_act_under_adamw(example):
    """The constant rule's 1.5 moves the encoders elsewhere than rule "none" does."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    hf_trainer = example("hf_trainer")
    ends = []
    for rule in ("none", "constant"):
        torch.manual_seed(0)
        with pytest.MonkeyPatch.context() as patch:
            criterion = arl_fast.loss.ARLLoss(reduction="sum", rule=rule)
            patch.setattr(hf_trainer.arl_fast, "ARLLoss", lambda criterion=criterion, **options: criterion)
            trainer, _ = hf_trainer.main(steps=6, rows=96)
        ends.append(torch.cat([p.detach().flatten() for p in trainer.model.audio.parameters()]))
    torch.manual_seed(0)
    start = torch.cat([p.detach().flatten() for p in hf_trainer.Model().audio.parameters()])
    assert (ends[1] - ends[0]).norm() > 0.2 * (ends[0] - start).norm()


def test_batchnorm(example):
    """Four seeds: with running statistics of all passes the whole model is worse in evaluation."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    _, fused_pass, all_passes = example("batchnorm").main(seeds=4).values()
    assert fused_pass.values("share").mean() > all_passes.values("share").mean() + 0.02
