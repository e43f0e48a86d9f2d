"""The statistics reach the loggers of each library, under their names, and no more often than these ask."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest
import torch

import arl_fast
from arl_fast.integrations import loggers
from arl_fast.integrations.loggers import StatsLogger, read, writer

ROOT = Path(__file__).parents[1]
NAMES = ["audio", "visual"]


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module


def training(logger, steps: int = 6, epochs: int = 1):
    """Steps with a tracked criterion, an evaluation each epoch; the gains of audio in every step."""
    head = arl_fast.ConcatHead(dict.fromkeys(NAMES, 4), 3)
    criterion = arl_fast.ARLLoss()
    criterion.track()
    stats_logger = logger(criterion)
    gains = []
    for _ in range(epochs):
        criterion.train()
        for _ in range(steps):
            criterion(
                head({m: torch.randn(8, 4, requires_grad=True) for m in NAMES}), torch.randint(3, (8,))
            ).backward()
            gains.append(float(criterion.stats.gains[0]))
            stats_logger.step()
        criterion.eval()
        with torch.no_grad():
            criterion(head({m: torch.randn(8, 4, requires_grad=True) for m in NAMES}), torch.randint(3, (8,)))
        criterion.history.end_epoch()
        stats_logger.epoch()
    return gains, criterion


class LogOnly:
    def __init__(self):
        self.records = []

    def log(self, values):
        self.records.append(values)


class LogWithStep(LogOnly):
    def log(self, values, step=None):
        self.records.append({**values, "step": step})


class Track(LogOnly):
    def track(self, value, name=None, step=None):
        self.records.append({name: value, "step": step})


@pytest.mark.parametrize("kind", [LogOnly, LogWithStep, Track])
def test_reads_the_device_only_when_a_record_is_due(kind, monkeypatch):
    reads = []
    monkeypatch.setattr(loggers, "read", lambda metrics: reads.append(1) or read(metrics))
    target = kind()
    gains, criterion = training(lambda criterion: StatsLogger(target, criterion, every=4), steps=10)
    assert len(reads) == 2
    found = [(r["step"], r["arl/gain/audio"]) for r in target.records if "arl/gain/audio" in r]
    assert found == [(4, gains[3]), (8, gains[7])]
    held_out = [
        r["arl/held_out/accuracy/fused"] for r in target.records if "arl/held_out/accuracy/fused" in r
    ]
    assert held_out == criterion.history.series("accuracy", "held_out")[:, 0].tolist()


def test_a_target_without_a_way_to_log_is_named():
    with pytest.raises(
        TypeError, match="target: got object, expected an object with one of the methods add_scalar"
    ):
        writer(object())
    criterion = arl_fast.ARLLoss()
    with pytest.raises(ValueError, match="every: got 0, expected a whole number of steps >= 1"):
        StatsLogger(LogOnly(), criterion, every=0)
    with pytest.raises(ValueError, match="criterion: has no history"):
        StatsLogger(LogOnly(), criterion).epoch()
    StatsLogger(LogOnly(), criterion, every=1).step()  # before the first call there is nothing to write


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as target:
        gains, _ = training(lambda criterion: StatsLogger(target, criterion, every=3))
    events = EventAccumulator(str(tmp_path)).Reload()
    found = [(e.step, e.value) for e in events.Scalars("arl/gain/audio")]
    assert [step for step, _ in found] == [3, 6]
    assert [value for _, value in found] == pytest.approx([gains[2], gains[5]])
    assert len(events.Scalars("arl/held_out/accuracy/visual")) == 1


def test_wandb(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_SILENT", "true")
    records = []
    run = wandb.init(mode="disabled", dir=str(tmp_path), project="test")
    log = type(run).log
    monkeypatch.setattr(
        type(run),
        "log",
        lambda self, data, step=None, **_: records.append((step, data)) or log(self, data, step=step),
    )
    gains, _ = training(lambda criterion: StatsLogger(run, criterion, every=3))
    run.finish()
    assert [(step, data["arl/gain/audio"]) for step, data in records if "arl/gain/audio" in data] == [
        (3, gains[2]),
        (6, gains[5]),
    ]
    assert "arl/held_out/accuracy/fused" in records[-1][1]


def test_mlflow(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    try:
        with mlflow.start_run() as run:
            gains, _ = training(lambda criterion: StatsLogger(mlflow, criterion, every=3))
        history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "arl/gain/audio")
    except (ImportError, ModuleNotFoundError) as error:
        pytest.skip(f"this mlflow cannot store metrics: {error}")
    assert [(m.step, m.value) for m in history] == [
        (3, pytest.approx(gains[2])),
        (6, pytest.approx(gains[5])),
    ]


def test_lightning(example, tmp_path):
    """Every second optimizer step into the logger's file, held-out means at the end of the epoch; and a
    resumed run goes on.
    """
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")
    from lightning.pytorch.loggers import CSVLogger

    from arl_fast.integrations.lightning import ARLCallback

    module = example("lightning_module")
    callback = ARLCallback()
    options = {
        "logger": CSVLogger(tmp_path),
        "log_every_n_steps": 2,
        "callbacks": [callback],
        "num_sanity_val_steps": 1,
    }
    trained, _ = module.main(epochs=2, rows=256, enable_checkpointing=False, **options)
    history = callback.history
    assert (history.step, history.epoch, history.modalities) == (16, 2, NAMES)  # 8 batches in an epoch
    assert trained.criterion.history is None
    held_out = history.rows("held_out")["count/fused"].tolist()
    assert held_out == [256, 256]  # without the batch of the sanity check
    (path,) = tmp_path.rglob("metrics.csv")
    header, *lines = [line.split(",") for line in path.read_text().splitlines()]
    steps = [int(row[header.index("step")]) for row in lines if row[header.index("arl/gain/audio")]]
    assert steps == [2, 4, 6, 8]  # two batches each
    gains = [
        float(row[header.index("arl/gain/audio")]) for row in lines if row[header.index("arl/gain/audio")]
    ]
    assert gains == pytest.approx(
        [float(history.rows()["gain/audio"][2 * step - 1]) for step in steps], abs=1e-6
    )
    held_out = [row[header.index("arl/held_out/accuracy/audio")] for row in lines]
    assert [float(cell) for cell in held_out if cell] == pytest.approx(
        history.rows("held_out")["accuracy/audio"].tolist(), abs=1e-6
    )

    again = ARLCallback()
    again.load_state_dict(callback.state_dict())
    options |= {"callbacks": [again], "logger": False}
    module.main(epochs=1, rows=256, enable_checkpointing=False, **options)
    assert (again.history.step, again.history.epoch) == (24, 3)
    with pytest.raises(ValueError, match="submodules of type ARLLoss, expected one"):
        ARLCallback().setup(None, lightning.LightningModule(), "fit")


def test_hf_trainer(example, tmp_path):
    """What the Trainer logs has the statistics in it; the history is in its checkpoint, and goes on from
    there.
    """
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from arl_fast.integrations import huggingface

    module = example("hf_trainer")
    histories = []

    def trainer(*arguments, **options):
        made = transformers_trainer(*arguments, **options)
        histories.append(huggingface.track(made, made.model.criterion))
        return made

    transformers_trainer = module.Trainer
    options = {
        "output_dir": str(tmp_path),
        "logging_steps": 2,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "Trainer", trainer)
        made, _ = module.main(steps=8, rows=256, **options)  # 2 epochs of 4 steps of 2 micro-batches
        history = histories[0]
        assert (history.step, history.epoch) == (16, 2)
        # each epoch, and at the end by hand
        assert history.rows("held_out")["count/fused"].tolist() == [
            128,
            128,
            128,
        ]
        records = made.state.log_history
        trained = [r for r in records if "loss" in r]
        assert [r["step"] for r in trained] == [2, 4, 6, 8]
        wanted = history.rows()["gain/audio"][torch.tensor([3, 7, 11, 15])].tolist()
        assert [r["arl/gain/audio"] for r in trained] == pytest.approx(wanted)
        evaluated = [r["eval_arl/accuracy/fused"] for r in records if "eval_loss" in r]
        assert evaluated == pytest.approx([r["eval_accuracy"] for r in records if "eval_loss" in r])

        saved = arl_fast.History.load(tmp_path / "checkpoint-4" / huggingface.HISTORY_FILE)
        assert (saved.step, saved.epoch) == (8, 1)
        model = module.Model()
        groups = [{"params": part.parameters()} for part in (model.audio, model.visual, model.head)]
        resumed = transformers_trainer(
            model,
            made.args,
            train_dataset=made.train_dataset,
            eval_dataset=made.eval_dataset,
            optimizers=(torch.optim.AdamW(groups, lr=1e-2), None),
            compute_loss_func=huggingface.compute_loss_func(model.criterion),
        )
        kept = huggingface.track(resumed, resumed.model.criterion)
        resumed.train(resume_from_checkpoint=os.fspath(tmp_path / "checkpoint-4"))
        assert (kept.step, kept.epoch) == (16, 2)
        assert kept.rows("epochs")["step"].tolist() == [8, 16]


def test_aim(tmp_path):
    aim = pytest.importorskip("aim", reason="aim is not installed")
    run = aim.Run(repo=str(tmp_path), system_tracking_interval=None, log_system_params=False)
    gains, _ = training(lambda criterion: StatsLogger(run, criterion, every=3))
    metric = run.get_metric("arl/gain/audio", aim.storage.context.Context({}))
    _, (values, *_) = metric.data.items_list()
    assert list(values) == pytest.approx([gains[2], gains[5]])
    run.close()
