"""task="multilabel" in use: evaluation, metrics, histories, callbacks, ``check``, the heads' own loss."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import arl_fast
from arl_fast import ARLLoss
from arl_fast.integrations.huggingface import compute_loss_func

NAMES = {"image": 5, "table": 3}
HEADS = {
    "concat": lambda: arl_fast.ConcatHead(NAMES, 7),
    "sum": lambda: arl_fast.SumHead(NAMES, 7),
    "gated": lambda: arl_fast.GatedHead(NAMES, 7),
}


class Model(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.encoders = nn.ModuleDict({name: nn.Linear(4, size) for name, size in NAMES.items()})
        self.head = head

    def forward(self, image, table):
        return self.head({"image": self.encoders["image"](image), "table": self.encoders["table"](table)})


def batch(rows=20):
    """Inputs, and labels of which some are not known."""
    target = torch.randint(0, 2, (rows, 7)).float()
    target[torch.rand(rows, 7) < 0.2] = math.nan
    return torch.randn(rows, 4), torch.randn(rows, 4), target


def louder_where_wrong(stats):
    return torch.softmax(3 * stats.loss[1:], 0)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("rule", ["share", louder_where_wrong])
def test_check_measures_the_gains_of_the_criterion(head, rule):
    """With the criterion's weights: a rule of the losses depends on them."""
    model, given = Model(HEADS[head]()), batch()
    criterion = ARLLoss(
        task="multilabel", rule=rule, weight=torch.rand(7), pos_weight=torch.tensor([9.0] * 3 + [0.1] * 4)
    )
    found = arl_fast.check(model, given, criterion)
    assert found.ok
    criterion(model(*given[:2]), given[2])
    assert list(found.said.values()) == pytest.approx(criterion.stats.gains.tolist(), rel=1e-5)
    assert list(found.real.values()) == pytest.approx(criterion.stats.gains.tolist(), rel=1e-3)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("unknown", [False, True])
def test_fused_logits_alone_in_evaluation(reduction, unknown):
    x, target = torch.randn(20, 7), batch()[2]
    weights = dict(weight=torch.rand(7), pos_weight=torch.rand(7))
    if not unknown:
        target = target.nan_to_num(1.0)
    criterion = ARLLoss(task="multilabel", reduction=reduction, **weights).eval()
    loss = criterion(x, target)
    assert criterion.stats is None
    if unknown:
        known = ~target.isnan()
        rows = F.binary_cross_entropy_with_logits(x, target.nan_to_num(), reduction="none", **weights)
        rows = torch.where(known, rows, 0)
        want = {"mean": rows.sum() / known.sum(), "sum": rows.sum(), "none": rows}[reduction]
        torch.testing.assert_close(loss, want)
    else:
        assert torch.equal(
            loss, F.binary_cross_entropy_with_logits(x, target, reduction=reduction, **weights)
        )
    with pytest.raises(ValueError, match=r"expected labels in \[0, 1\]"):
        criterion(x, target + 1)


def test_history_and_metrics_count_the_known_pairs():
    model = Model(HEADS["concat"]())
    criterion = ARLLoss(task="multilabel")
    history = criterion.track()
    batches = [batch(20), batch(9)]
    for image, table, target in batches:
        criterion(model(image, table), target).backward()
    metrics = criterion.metrics()
    right = (model(*batches[1][:2]).fused > 0) == (batches[1][2] > 0.5)
    known = ~batches[1][2].isnan()
    assert float(metrics["arl/accuracy/fused"]) == pytest.approx(float(right[known].float().mean()))
    assert float(metrics["arl/count/table"]) == int(known.sum())
    criterion.eval()
    losses, counts = [], []
    with torch.no_grad():
        for image, table, target in batches:
            out = model(image, table)
            losses.append(float(criterion(out, target)) - float(sum(criterion.stats.loss[1:])))
            counts.append(int((~target.isnan()).sum()))
    history.end_epoch()
    assert history.step == 2
    held_out = history.rows("held_out")
    mean = sum(loss * n for loss, n in zip(losses, counts, strict=True)) / sum(counts)
    assert float(held_out["loss/fused"][0]) == pytest.approx(mean, rel=1e-5)
    assert float(held_out["count/fused"][0]) == sum(counts)


def test_trainers_loss_function():
    model, (image, table, target) = Model(HEADS["sum"]()), batch()
    out = model(image, table)
    outputs = {"loss": torch.zeros(()), "fused": out.fused, **out.unimodal, "link": out.link}
    criterion = ARLLoss(task="multilabel", reduction="sum")
    loss, mean = compute_loss_func(criterion), ARLLoss(task="multilabel")
    torch.testing.assert_close(loss(outputs, target), mean(out, target))
    torch.testing.assert_close(criterion.stats.gains, mean.stats.gains)
    known = (~target.isnan()).sum()
    torch.testing.assert_close(loss(outputs, target, num_items_in_batch=2 * known), mean(out, target) / 2)


def test_lightning_callback(tmp_path):
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")
    from arl_fast.integrations.lightning import ARLCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.criterion = Model(HEADS["concat"]()), ARLLoss(task="multilabel")

        def training_step(self, given, index):
            return self.criterion(self.model(*given[:2]), given[2])

        def validation_step(self, given, index):
            self.criterion(self.model(*given[:2]), given[2])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callback, held_out = ARLCallback(), batch(11)
    options = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer = lightning.Trainer(
        max_epochs=2, callbacks=[callback], enable_model_summary=False, accelerator="cpu", **options
    )
    train, validation = (DataLoader(TensorDataset(*rows), batch_size=20) for rows in (batch(40), held_out))
    trainer.fit(Module(), train, validation)
    assert callback.history.step == 4
    counts = callback.history.rows("held_out")["count/fused"]
    assert counts.tolist() == [int((~held_out[2].isnan()).sum())] * 2


def test_gains_on_the_update():
    """AdamW's update is scaled by the gains of the labels' statistics."""
    model, (image, table, target) = Model(HEADS["concat"]()), batch()
    criterion = ARLLoss(task="multilabel", rule="constant")
    groups = [{"params": part.parameters()} for part in (*model.encoders.values(), model.head)]
    optimizer = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.0)
    arl_fast.optim.UpdateGains(optimizer, {"image": 0, "table": 1}, criterion)
    before = [p.detach().clone() for p in model.parameters()]
    criterion(arl_fast.optim.detach_link(model(image, table)), target).backward()
    optimizer.step()
    moved = [(p - q).abs().max().item() for p, q in zip(model.parameters(), before, strict=True)]
    assert moved == pytest.approx([0.15] * 4 + [0.1] * 2, rel=1e-3)
