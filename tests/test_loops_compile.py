"""torch.compile, torch.export, torch.func and higher derivatives: works, or an error that says why not."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import arl_fast
from arl_fast import ARLLoss


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({name: nn.Linear(8, 6) for name in ("a", "v")})
        self.head = arl_fast.ConcatHead({"a": 6, "v": 6}, 5)

    def forward(self, a, v):
        return self.head({"a": self.encoders["a"](a), "v": self.encoders["v"](v)})


def batch(rows):
    return torch.randn(rows, 8), torch.randn(rows, 8), torch.randint(0, 5, (rows,))


def same_steps(compiled, plain, sizes, recompiles_at=()):
    """Compiled and eager training side by side: loss, gradients, statistics and counter, and no recompilation
    after the first step.
    """
    (model, criterion, step), (other, eager) = compiled, plain
    for i, rows in enumerate(sizes):
        a, v, target = batch(rows)
        model.zero_grad()
        other.zero_grad()
        with torch._dynamo.config.patch(error_on_recompile=i > 0 and i not in recompiles_at):
            loss = step(a, v, target)
        loss.backward()
        expected = eager(other(a, v), target)
        expected.backward()
        torch.testing.assert_close(loss, expected)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
        for x, y in zip(criterion.stats, eager.stats, strict=True):
            torch.testing.assert_close(x, y)
        assert torch.equal(criterion.steps, eager.steps)
        assert bool((criterion.stats.gains > 1).all()) == (i >= eager.warmup)


@pytest.mark.parametrize(
    ("backend", "dynamic", "sizes"),
    [
        ("aot_eager", False, (7, 7, 7, 7)),
        ("inductor", True, (7, 12, 33, 7)),
    ],
)
def test_whole_step_in_one_graph(implementation, backend, dynamic, sizes):
    """fullgraph; one compilation for all batch sizes where dynamic; through the end of the warm-up."""
    torch._dynamo.reset()
    model, criterion = Model(), ARLLoss(gamma=2.0, warmup=2)
    plain = copy.deepcopy(model), copy.deepcopy(criterion)
    step = torch.compile(
        lambda a, v, y: criterion(model(a, v), y), fullgraph=True, backend=backend, dynamic=dynamic
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lru_cache.*")
        same_steps((model, criterion, step), plain, sizes)


def test_batch_size_becomes_dynamic_by_itself(implementation):
    """Without a word about it: the second size recompiles once, then no more."""
    torch._dynamo.reset()
    model, criterion = Model(), ARLLoss()
    plain = copy.deepcopy(model), copy.deepcopy(criterion)
    step = torch.compile(lambda a, v, y: criterion(model(a, v), y), fullgraph=True, backend="aot_eager")
    same_steps((model, criterion, step), plain, (7, 12, 33, 9), recompiles_at=(1,))


@pytest.mark.parametrize(
    "options",
    [
        {
            "gamma": torch.tensor(2.0),
            "temperature": torch.tensor(3.0),
            "label_smoothing": 0.1,
            "weight": torch.rand(5),
        },
        {"rule": lambda stats: stats.entropy / stats.entropy.sum(), "reduction": "sum"},
        {"rule": "paper", "dependence": "logit_l1", "reduction": "none"},
    ],
    ids=["tensors", "callable", "rows"],
)
def test_options_in_one_graph(implementation, options):
    torch._dynamo.reset()
    model, criterion = Model(), ARLLoss(**options)
    a, v, target = batch(9)
    mask = torch.rand(9, 2) > 0.3
    out = model(a, v)
    got = torch.compile(criterion, fullgraph=True, backend="aot_eager")(out, target, mask)
    gains = criterion.stats.gains.clone()
    expected = criterion(out, target, mask)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gains, criterion.stats.gains)
    parameters = list(model.parameters())
    for x, y in zip(
        torch.autograd.grad(got.sum(), parameters, retain_graph=True),
        torch.autograd.grad(expected.sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(x, y)


def test_compiled_model_with_the_loss_outside(implementation):
    """The graph ends between modulate and the loss: the link crosses it."""
    torch._dynamo.reset()
    model, criterion = Model(), ARLLoss()
    plain = copy.deepcopy(model), copy.deepcopy(criterion)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    same_steps((model, criterion, lambda a, v, y: criterion(compiled(a, v), y)), plain, (7, 7))


def test_functional_form_compiles_without_a_warning(implementation):
    torch._dynamo.reset()
    model = Model()

    def step(a, v, target):
        out = model(a, v)
        return arl_fast.arl_loss(out.fused, out.unimodal, target, out.link)

    a, v, target = batch(7)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lru_cache.*")
        loss, stats = torch.compile(step, fullgraph=True, backend="aot_eager")(a, v, target)
    expected, expected_stats = step(a, v, target)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(stats, expected_stats)


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_a_model_with_a_head(strict):
    model = Model().eval()
    a, v, _ = batch(7)
    rows = torch.export.Dim("rows")
    with torch.no_grad():
        program = torch.export.export(model, (a, v), dynamic_shapes=({0: rows}, {0: rows}), strict=strict)
    a, v, _ = batch(12)
    torch.testing.assert_close(program.module()(a, v), model(a, v))
    # what it runs in needs no arl_fast
    assert not any("arl_fast" in str(node.target) for node in program.graph.nodes)


def test_export_of_a_model_with_its_loss():
    """In evaluation; the loss is plain torch or one registered op."""

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.criterion = Model(), ARLLoss()

        def forward(self, a, v, target):
            return self.criterion(self.model(a, v), target)

    module = WithLoss().eval()
    a, v, target = batch(7)
    with torch.no_grad():
        program = torch.export.export(module, (a, v, target))
        torch.testing.assert_close(program.module()(a, v, target), module(a, v, target))


def test_torch_func_transforms_say_why_not(implementation):
    model, criterion = Model(), ARLLoss()
    a, v, target = batch(4)

    def loss(parameters):
        return criterion(torch.func.functional_call(model, parameters, (a, v)), target)

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    # functional_call alone works
    torch.testing.assert_close(loss(parameters), criterion(model(a, v), target))
    logits = [torch.randn(4, 5) for _ in range(3)]
    for what, call in (
        ("modulate", lambda: torch.func.grad(loss)(parameters)),
        ("modulate", lambda: torch.func.vmap(lambda z: model(z, z).fused)(torch.randn(3, 4, 8))),
        (
            "arl_loss",
            lambda: torch.func.vmap(lambda x: arl_fast.arl_loss(x, [x, x], target)[0])(torch.randn(3, 4, 5)),
        ),
        (
            "arl_loss",
            lambda: torch.func.jvp(
                lambda x: arl_fast.arl_loss(x, logits, target)[0], (logits[0],), (logits[1],)
            ),
        ),
    ):
        with pytest.raises(
            RuntimeError, match=rf"{what}: called inside a transform of torch\.func .*loss\.backward\(\)"
        ):
            call()
    # predictions alone are ordinary functions
    ensemble = torch.func.vmap(lambda z: model.head.branches([z, z])[0])(torch.randn(3, 4, 6))
    assert ensemble.shape == (3, 4, 5)


def test_second_derivatives_raise(implementation):
    """Gradients that are computed in forward have no graph: silently they would count as constants."""
    x = torch.randn(4, 5, requires_grad=True)
    loss, _ = arl_fast.arl_loss(x, [x, x], torch.randint(0, 5, (4,)), torch.zeros(2))
    with pytest.raises(
        RuntimeError, match="create_graph=True, but its gradients are computed in the forward pass"
    ):
        torch.autograd.grad(loss, x, create_graph=True)


def test_batched_upstream_gradients(implementation):
    """torch.autograd.grad(is_grads_batched=True): the rows of a Jacobian."""
    x = torch.randn(3, 5, requires_grad=True)
    target = torch.randint(0, 5, (3,))
    loss, _ = arl_fast.arl_loss(x, [2 * x, -x], target, torch.zeros(2), reduction="none")
    (jacobian,) = torch.autograd.grad(loss, x, torch.eye(3), retain_graph=True, is_grads_batched=True)
    for i in range(3):
        (row,) = torch.autograd.grad(loss[i], x, retain_graph=True)
        torch.testing.assert_close(jacobian[i], row)


@pytest.mark.parametrize("modalities", [1, 2, 3])
def test_evaluation_in_one_graph(implementation, modalities):
    """Without gradients: under no_grad, and with everything frozen."""
    torch._dynamo.reset()
    head, criterion = arl_fast.ConcatHead([4] * modalities, 5).eval(), ARLLoss().eval()
    features = [torch.randn(3, 4) for _ in range(modalities)]
    target = torch.randint(0, 5, (3,))
    step = torch.compile(lambda: criterion(head(features), target), fullgraph=True, backend="aot_eager")
    expected = criterion(head(features), target).detach()
    with torch.no_grad():
        torch.testing.assert_close(step(), expected)
    head.requires_grad_(False)
    got = step()
    assert not got.requires_grad
    torch.testing.assert_close(got, expected)


def test_jit_trace_of_predictions_but_not_of_what_trains(implementation):
    """Without gradients a head's logits are a function of its inputs; all else would be a constant."""
    model, (a, v, target) = Model().eval(), batch(7)

    class Predictions(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, a, v):
            out = self.model(a, v)
            return out.fused, *out.unimodal.values()

    class Loss(Predictions):
        def forward(self, a, v):
            return ARLLoss()(self.model(a, v), target)

    with torch.no_grad():
        traced = torch.jit.trace(Predictions(), (a, v))
        other = torch.randn(3, 8), torch.randn(3, 8)
        for got, want in zip(traced(*other), Predictions()(*other), strict=True):
            torch.testing.assert_close(got, want)
        with pytest.raises(RuntimeError, match=r"arl_loss: called inside torch.jit.trace.*torch.export"):
            torch.jit.trace(Loss(), (a, v))
    with pytest.raises(RuntimeError, match=r"modulate: called inside torch.jit.trace.*torch.no_grad\(\)"):
        torch.jit.trace(Predictions(), (a, v))
