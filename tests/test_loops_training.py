"""Accumulation, normalisers, checkpoints, several losses, resuming, DataParallel: training loops as people
write them.
"""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import arl_fast
from arl_fast import ARLLoss, BranchLogits


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(
            {name: nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 6)) for name in ("a", "v")}
        )
        self.head = arl_fast.ConcatHead({"a": 6, "v": 6}, 5)

    def forward(self, x):
        return self.head({name: encoder(x[name]) for name, encoder in self.encoders.items()})


def batch(rows=12):
    return {name: torch.randn(rows, 8) for name in ("a", "v")}, torch.randint(0, 5, (rows,))


def grads(model, loss) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters()]


def equal(a, b) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y)


def slices(x, target, *sizes):
    start = 0
    for size in sizes:
        yield {name: z[start : start + size] for name, z in x.items()}, target[start : start + size]
        start += size


def test_accumulation_with_a_given_normaliser(implementation):
    """Unequal micro-batches with reduction "sum" over the number of all rows: the gradients of one batch, at
    equal gains.
    """
    model, (x, target) = Model(), batch()
    target[3] = -100
    expected = grads(model, ARLLoss(rule="constant")(model(x), target))
    criterion = ARLLoss(rule="constant", reduction="sum")
    items = (target != -100).sum()
    model.zero_grad()
    for part, labels in slices(x, target, 2, 7, 3):
        (criterion(model(part), labels) / items).backward()
    equal([p.grad for p in model.parameters()], expected)


def test_coefficients_are_those_of_each_micro_batch(implementation):
    """Accumulated gradients are the sum of each micro-batch's own, with its own gains."""
    model, (x, target) = Model(), batch()
    parts = list(slices(x, target, 4, 8))
    expected, gains = [0.0] * len(list(model.parameters())), []
    for part, labels in parts:
        criterion = ARLLoss()
        plain = grads(model, ARLLoss(rule="none")(model(part), labels))
        criterion(model(part), labels)
        gains.append(criterion.stats.gains)
        for i, (name, _) in enumerate(model.named_parameters()):
            gain = criterion.stats.gains[0 if ".a." in name else 1] if "encoders" in name else 1
            expected[i] = expected[i] + plain[i] * gain
    assert not torch.allclose(*gains)
    criterion = ARLLoss()
    model.zero_grad()
    for part, labels in parts:
        criterion(model(part), labels).backward()
    equal([p.grad for p in model.parameters()], expected)


def test_sum_has_the_statistics_of_mean(implementation):
    """And the loss and the gradients of mean times the rows; so does a division of the loss leave the gains
    alone.
    """
    model, (x, target) = Model(), batch()
    total, mean = ARLLoss(reduction="sum"), ARLLoss()
    summed = grads(model, total(model(x), target) / len(target))
    equal(summed, grads(model, mean(model(x), target)))
    equal(total.stats, mean.stats)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_encoders(implementation, reentrant):
    """Encoders inside, modulate and the loss outside: as most people checkpoint."""
    model, (x, target) = Model(), batch()
    expected = grads(model, ARLLoss()(model(x), target))

    def forward(x):
        # reentrant checkpointing asks for such an input
        leaf = {name: z.clone().requires_grad_() for name, z in x.items()}
        return model.head(
            {
                name: checkpoint(encoder, leaf[name], use_reentrant=reentrant)
                for name, encoder in model.encoders.items()
            }
        )

    equal(grads(model, ARLLoss()(forward(x), target)), expected)


def test_checkpointed_encoders_compiled(implementation):
    torch._dynamo.reset()
    model, (x, target) = Model(), batch()
    expected = grads(model, ARLLoss()(model(x), target))
    criterion = ARLLoss()

    def step(x, target):
        features = {
            name: checkpoint(encoder, x[name], use_reentrant=False)
            for name, encoder in model.encoders.items()
        }
        return criterion(model.head(features), target)

    equal(grads(model, torch.compile(step, fullgraph=True, backend="aot_eager")(x, target)), expected)


def test_two_tasks_with_a_head_each(implementation):
    """Two losses on features that each task modulates: gradients add up, each with its own gains."""
    model, (x, target) = Model(), batch()
    second, other = arl_fast.SumHead({"a": 6, "v": 6}, 3), torch.randint(0, 3, (12,))

    def features():
        return {name: encoder(x[name]) for name, encoder in model.encoders.items()}

    criterion = ARLLoss()
    one = grads(model.encoders, criterion(model.head(features()), target))
    two = grads(model.encoders, criterion(second(features()), other))
    z = features()
    both = grads(model.encoders, criterion(model.head(z), target) + criterion(second(z), other))
    equal(both, [a + b for a, b in zip(one, two, strict=True)])


def test_an_auxiliary_loss_on_the_features_is_scaled_after_modulate_only(implementation):
    """What is computed from the features that went into modulate keeps its own gradient."""
    model, (x, target) = Model(), batch()
    z = {name: encoder(x[name]) for name, encoder in model.encoders.items()}
    extra = sum(v.square().mean() for v in z.values())
    criterion = ARLLoss()
    both = grads(model.encoders, criterion(model.head(z), target) + extra)
    z = {name: encoder(x[name]) for name, encoder in model.encoders.items()}
    alone = grads(model.encoders, sum(v.square().mean() for v in z.values()))
    z = {name: encoder(x[name]) for name, encoder in model.encoders.items()}
    arl = grads(model.encoders, criterion(model.head(z), target))
    equal(both, [a + b for a, b in zip(alone, arl, strict=True)])


def test_resume_in_mid_warmup(implementation):
    """A run that is saved and restored in the middle of the warm-up makes the steps of one that was not."""

    def train(steps, state=None):
        torch.manual_seed(3)
        data = [batch() for _ in range(6)]
        model, criterion = Model(), ARLLoss(gamma=2.0, warmup=3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        modules = nn.ModuleDict({"model": model, "criterion": criterion})
        start = 0
        if state is not None:
            saved = torch.load(state)
            modules.load_state_dict(saved["modules"])
            optimizer.load_state_dict(saved["optimizer"])
            start = saved["step"]
        for x, target in data[start:steps]:
            optimizer.zero_grad()
            criterion(model(x), target).backward()
            optimizer.step()
        file = io.BytesIO()
        torch.save(
            {"modules": modules.state_dict(), "optimizer": optimizer.state_dict(), "step": steps}, file
        )
        file.seek(0)
        return [p.detach() for p in model.parameters()], file

    straight, _ = train(6)
    _, file = train(2)
    resumed, _ = train(6, file)
    for a, b in zip(straight, resumed, strict=True):
        assert torch.equal(a, b)


def test_only_training_steps_count_for_the_warmup():
    """Neither evaluation nor a call without gradients, as a Trainer's validation of a criterion outside the
    model is.
    """
    model, (x, target) = Model(), batch()
    criterion = ARLLoss(warmup=5)
    criterion(model(x), target)
    criterion.eval()(model(x), target)
    criterion.train()
    with torch.no_grad():
        criterion(model(x), target)
    assert int(criterion.steps) == 1


def test_deepcopy_of_model_and_criterion_after_a_step(implementation):
    """As an average of weights (EMA, SWA) makes one, with a graph and statistics alive."""
    model, criterion = Model(), ARLLoss(warmup=1)
    x, target = batch()
    loss = criterion(model(x), target)
    twin, other = copy.deepcopy(model), copy.deepcopy(criterion)
    loss.backward()
    equal(other.stats, criterion.stats)
    a = criterion(model(x), target)
    b = other(twin(x), target)
    torch.testing.assert_close(a, b)
    assert int(other.steps) == int(criterion.steps) == 2
    swa = torch.optim.swa_utils.AveragedModel(model)
    swa.update_parameters(model)
    torch.testing.assert_close(swa(x).fused, model(x).fused)


def test_data_parallel_wraps_the_model(implementation):
    """Without a GPU DataParallel calls the module itself."""
    model, (x, target) = Model(), batch()
    expected = grads(model, ARLLoss()(model(x), target))
    equal(grads(model, ARLLoss()(nn.DataParallel(model)(x), target)), expected)


@pytest.mark.parametrize("replicas", [2, 3])
def test_gathered_replicas(implementation, replicas):
    """DataParallel concatenates what its replicas return, the links too: each gets the gains of the whole
    batch.
    """
    model, (x, target) = Model(), batch()
    criterion = ARLLoss()
    expected = grads(model, criterion(model(x), target))
    parts = [model(part) for part, _ in slices(x, target, *[12 // replicas] * replicas)]
    fused = torch.cat([p.fused for p in parts])
    unimodal = {name: torch.cat([p.unimodal[name] for p in parts]) for name in ("a", "v")}
    gathered = BranchLogits(fused, unimodal, torch.cat([p.link for p in parts]))
    assert gathered.link.shape == (2 * replicas,)
    equal(grads(model, criterion(gathered, target)), expected)
    with pytest.raises(ValueError, match=r"link: got shape \[3\], expected \[2\]"):
        criterion((fused, unimodal, torch.zeros(3)), target)


def test_gradient_clipping_sees_the_scaled_gradients(implementation):
    """The gains are in p.grad when backward returns: clipping and logging of norms need no order of hooks."""
    model, (x, target) = Model(), batch()
    criterion = ARLLoss()
    scaled = grads(model, criterion(model(x), target))
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    torch.testing.assert_close(norm, torch.stack([g.norm() for g in scaled]).norm())
