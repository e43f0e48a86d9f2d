"""``arl_fast.check``: does every encoder get the gain that the loss reports? Measured on the user's model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._autograd.link import for_replicas
from ._autograd.loss import loss_and_packed
from ._core import graph, wiring
from ._core.branches import Targets, as_branch_logits, mask_of
from ._core.options import Schedule
from ._core.stats import unpack
from .loss import ARLLoss

_TARGETS = ("labels", "label", "target", "targets", "y")
_EMBEDDINGS = ("EmbeddingBackward0", "EmbeddingBagBackward0")  # data that has no gradient enters here


class Check(NamedTuple):
    """What ``check`` has measured; print it.

    Attributes:
        said: the gain of each modality, as ``criterion.stats.gains`` tells it.
        real: the factor on the gradient of each modality's encoder between rule "none" and the criterion's
            rule (on its update with an ``UpdateGains``); None where no parameter of its own was found.
        problems: what is wrong, in sentences; empty if every encoder gets its gain.
        notes: what is worth knowing: parameters that several modalities share, modalities without an encoder
            of their own.
    """

    said: dict[Any, float]
    real: dict[Any, float | None]
    problems: list[str]
    notes: list[str]

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        width = max(len("modality"), *(len(str(name)) for name in self.said))
        lines = [f"{'modality':{width}}  said  real"]
        for name, said in self.said.items():
            real = self.real[name]
            lines.append(f"{name!s:{width}}  {said:.2f}  {'-' if real is None else f'{real:.2f}'}")
        lines += [f"wrong: {problem}" for problem in self.problems] or ["every encoder gets its gain"]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def check(
    model: nn.Module,
    batch: Any,
    criterion: ARLLoss,
    optimizer: torch.optim.Optimizer | None = None,
    step: Callable[[nn.Module, Any], tuple[Any, ...]] | None = None,
) -> Check:
    """Measure, at equal parameters, what each encoder's gradient is multiplied by, and compare it with what
    the loss says.

        print(arl_fast.check(model, next(iter(loader)), criterion, optimizer))

    One forward and M + 4 backward passes, without the warm-up. The model, its buffers, gradients and random
    numbers, and the criterion are left as they were. It finds features that bypass ``modulate`` or get
    another modality's gain, a link that is detached or of another step, parameters that modalities share,
    gains that act twice or nowhere, and an optimiser that cancels them.

    Args:
        model: the model in the mode in which it trains. Wrappers (DataParallel, DDP, torch.compile) are taken
            off.
        batch: (inputs..., target) for ``model(*inputs)``, or a dict with the target under one of "labels",
            "label", "target", "targets", "y" for ``model(**others)``.
        criterion: the ``ARLLoss`` of the training loop, with its ``UpdateGains`` in place, if there is one.
        optimizer: the optimiser of the training loop; that of an ``UpdateGains`` is known.
        step: for any other batch or model, a function of model and batch to (output, target) or (output,
            target, mask), with the output that the criterion gets, before a ``detach_link``.

    Returns:
        Check: a table of said and real factors, and what is wrong, with the names of parameters.

    Raises:
        TypeError, ValueError: a criterion or batch of another kind; whatever the loss itself raises.
    """
    if not isinstance(criterion, ARLLoss):
        raise TypeError(f"criterion: got {type(criterion).__name__}, expected an ARLLoss")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    while (inner := _unwrapped(model)) is not None:
        model = inner
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = sorted({x.device.index for x in model.parameters() if x.is_cuda})
    try:
        with torch.random.fork_rng(devices), torch.enable_grad():
            leaves: list[Tensor] = []
            output, target, *mask = (step or _usual_step)(model, _watched(batch, leaves))
            measured = _Measured(model, criterion, output, Targets(target.detach(), *mask), leaves)
            return _judged(measured, criterion, optimizer)
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _unwrapped(model: nn.Module) -> nn.Module | None:
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return model.module
    return getattr(model, "_orig_mod", None)  # torch.compile


def _watched(batch: Any, leaves: list[Tensor]) -> Any:
    """The batch with floating-point inputs that record where they go: copies of new leaves."""
    if isinstance(batch, Tensor) and batch.is_floating_point():
        leaves.append(batch.detach().requires_grad_())
        return leaves[-1].clone()
    if isinstance(batch, dict):
        return {name: _watched(value, leaves) for name, value in batch.items()}
    if type(batch) in (list, tuple):
        return type(batch)(_watched(value, leaves) for value in batch)
    return batch


def _usual_step(model: nn.Module, batch: Any) -> tuple[Any, Tensor]:
    if isinstance(batch, Mapping) and (name := next((n for n in _TARGETS if n in batch), None)) is not None:
        return model(**{key: value for key, value in batch.items() if key != name}), batch[name]
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        *inputs, target = batch
        return model(*inputs), target
    raise TypeError(
        f"batch: got {type(batch).__name__}, expected (inputs..., target) or a dict with one of "
        f"{', '.join(_TARGETS)}; for others give step=, a function of model and batch to (output, target)"
    )


class _Measured:
    """What gradients and graph tell of one step.

    Attributes:
        names: of the modalities; said: their gains.
        parameters: those that get a gradient, by name.
        weight: by parameter, the squared norm of its gradient.
        factor: by parameter, the chosen rule's gradient over that of rule "none".
        through: by parameter [M], which part of its gradient each entry of the link scales.
        moves: by parameter, the modalities whose unimodal logits it moves.
        bypassing: parameters between the data and the logits that are not behind any modulate.
    """

    def __init__(
        self, model: nn.Module, criterion: ARLLoss, output: Any, targets: Targets, leaves: list[Tensor]
    ) -> None:
        branches = as_branch_logits(output)
        if targets.mask is None:
            targets = targets._replace(mask=mask_of(output))
        fused, unimodal, link = branches
        by_name = isinstance(unimodal, Mapping)
        self.names: list[Any] = list(unimodal) if by_name else list(range(len(unimodal)))
        logits = [unimodal[name] for name in self.names]  # type: ignore[index]
        schedule = Schedule(criterion.gamma, criterion.temperature)
        targets = targets._replace(weight=criterion.weight, pos_weight=criterion.pos_weight)
        loss, packed = loss_and_packed(branches, targets, schedule, criterion.options)
        none, _ = loss_and_packed(branches, targets, schedule, criterion.options._replace(rule="none"))
        self.said = dict(zip(self.names, unpack(packed).gains.tolist(), strict=True))
        self.link: Tensor = link if link is not None else fused.new_zeros(len(logits))

        given = {name: p for name, p in model.named_parameters() if p.requires_grad}
        plain = _gradients(none.sum(), given)
        self.parameters = {name: given[name] for name, g in plain.items() if _norm(g) > 0}
        plain = {name: plain[name] for name in self.parameters}
        self.weight = {name: _norm(g) ** 2 for name, g in plain.items()}
        scaled = _gradients(loss.sum(), self.parameters)
        self.factor = {name: _along(scaled[name], g) for name, g in plain.items()}

        self.through = {name: [0.0] * len(logits) for name in self.parameters}
        self.moves: dict[str, set[Any]] = {name: set() for name in self.parameters}
        signs = torch.sign(torch.randn(fused.shape)).to(fused)
        own = {}
        for m, name in enumerate(self.names):
            # a head leaves NaN where a modality is absent
            present = torch.where(logits[m].isnan(), 0, logits[m])
            own[name] = _gradients((present * signs).sum(), self.parameters)
            if self.link.requires_grad:
                entry = torch.zeros(len(logits), dtype=self.link.dtype, device=self.link.device)
                entry[m] = 1
                probed = _gradients(none.sum(), self.parameters, self.link, for_replicas(self.link, entry))
                for parameter, g in plain.items():
                    self.through[parameter][m] = _along(probed[parameter], g) - 1
        for parameter in self.parameters:
            sizes = {name: _norm(g[parameter]) for name, g in own.items()}
            most = max(sizes.values())
            self.moves[parameter] = {name for name, size in sizes.items() if size > 1e-6 * most}

        tensors = [fused, *logits]
        self.modulates = graph.modulates_behind(tensors)
        of_link = graph.modulates_behind([self.link])
        self.foreign = self.link.requires_grad and not any(node in self.modulates for node in of_link)
        self.bypassing = _bypassing(tensors, self.parameters, leaves) if self.modulates else set()

    def owned(self, modality: Any) -> list[str]:
        """The parameters of a modality's own encoder: not of the head, not of another modality."""
        return [name for name, moved in self.moves.items() if moved == {modality} and self.encodes(name)]

    def encodes(self, parameter: str) -> bool:
        if not self.modulates or self.foreign:
            return True  # nothing tells an encoder from a part of the head that one modality uses
        return (
            parameter in self.bypassing
            or max(map(abs, self.through[parameter])) > 1e-3
            or not self.link.requires_grad
        )


def _judged(measured: _Measured, criterion: ARLLoss, optimizer: torch.optim.Optimizer | None) -> Check:
    updates = wiring.updates_of(criterion)
    real: dict[Any, float | None] = {}
    problems, notes = [], []
    if not criterion.options.scales:
        notes.append("rule 'none' gives every encoder the gain 1")
    elif not measured.link.requires_grad and updates is None:
        problems.append(wiring.why_no_gradient(measured.link))
    elif measured.foreign:
        problems.append(
            "link: its modulate took no part in these logits: give the loss the link that modulate "
            "returned together with the features that the head gets"
        )
    known = not problems and criterion.options.scales  # else no encoder gets its gain, for that one reason
    factor = measured.factor if updates is None else _on_the_update(measured, updates)
    for m, name in enumerate(measured.names):
        owned = measured.owned(name)
        weight = sum(measured.weight[p] for p in owned)
        real[name] = sum(factor[p] * measured.weight[p] for p in owned) / weight if owned else None
        if not owned:
            notes.append(
                f"{name!r}: no parameter moves its unimodal logits alone, so that it has no factor of its own"
            )
        elif known and updates is not None:
            if wrong := [p for p in owned if not _near(factor[p], measured.said[name])]:
                problems.append(f"{name!r}: {_some(wrong)} in none of the parameter groups of its modality")
        elif known:
            problems += _wrong_paths(measured, m, owned)
    if known:
        problems += _wrong_elsewhere(measured, factor, updates, notes)
    optimizer = optimizer or (updates.optimizer if updates is not None else None)
    if (
        optimizer is not None
        and updates is None
        and criterion.options.scales
        and wiring.cancels_gains(optimizer)
    ):
        problems.append(
            f"optimizer: {type(optimizer).__name__} divides each gradient by a running estimate of its "
            "size, which cancels most of the gains: arl_fast.optim.UpdateGains, or SGD"
        )
    return Check(measured.said, real, problems, notes)


def _wrong_paths(measured: _Measured, m: int, owned: Sequence[str]) -> list[str]:
    """Which of a modality's parameters get another gain than its own, by where their gradients went."""
    name = measured.names[m]
    around, partly, other = [], [], []
    swapped: dict[Any, list[str]] = {}
    for parameter in owned:
        through = measured.through[parameter]
        rest = [part for k, part in enumerate(through) if k != m]
        if max(rest, default=0.0) > 0.05:
            swapped.setdefault(measured.names[through.index(max(rest))], []).append(parameter)
        elif through[m] < 0.05:
            around.append(parameter)
        elif through[m] < 0.95:
            partly.append(parameter)
        elif not _near(measured.factor[parameter], measured.said[name]):
            other.append(parameter)
    found = [
        f"{name!r}: {_some(parameters)} get the gain of {wrong!r}: the features of modulate and the "
        "unimodal logits are in different orders, or several features of one modality are not in one list"
        for wrong, parameters in swapped.items()
    ]
    if around:
        found.append(
            f"{name!r}: the gradient of {_some(around)} bypasses modulate: give the head the features that "
            "modulate returns"
        )
    if partly:
        found.append(f"{name!r}: a part of the gradient of {_some(partly)} bypasses modulate")
    if other:
        found.append(f"{name!r}: {_some(other)} get another factor than the statistics say")
    return found


def _wrong_elsewhere(
    measured: _Measured, factor: Mapping[str, float], updates: Any, notes: list[str]
) -> list[str]:
    """Parameters of no modality or of several: what bypasses modulate, is shared, or is a scaled head."""
    shared = [p for p, moved in measured.moves.items() if len(moved) != 1 and max(measured.through[p]) > 1e-3]
    if shared:
        notes.append(f"several modalities share {_some(shared)}, which get a mixture of their gains")
    found = []
    around = [
        p for p in measured.bypassing if len(measured.moves[p]) != 1 and max(measured.through[p]) <= 1e-3
    ]
    if around:
        found.append(
            f"the gradient of {_some(around)} bypasses modulate: these are computed from the data, and no "
            "gain reaches them"
        )
    head = [p for p in measured.parameters if not measured.encodes(p)]
    if updates is not None and (scaled := [p for p in head if not _near(factor[p], 1.0)]):
        found.append(
            f"{_some(scaled)} in a modality's parameter group, but a part of the head, whose gain is 1"
        )
    return found


def _on_the_update(measured: _Measured, updates: Any) -> dict[str, float]:
    """By parameter, what an UpdateGains multiplies its learning rate by."""
    names = list(measured.said)
    gain_of = {
        id(p): measured.said[name if updates.by_name else names[name]]
        for name, indices in updates.groups.items()
        for index in indices
        for p in updates.optimizer.param_groups[index]["params"]
    }
    return {name: gain_of.get(id(p), 1.0) for name, p in measured.parameters.items()}


# ---- gradients and the graph -------------------------------------------------------------------------------


def _gradients(
    loss: Tensor, parameters: Mapping[str, Tensor], link: Tensor | None = None, entry: Tensor | None = None
) -> dict[str, Tensor]:
    """Gradients by name; with a link, as if the loss gave that gradient to the link."""
    outputs = [loss] if link is None else [loss, link]
    upstream = [torch.ones_like(loss)] if link is None else [torch.ones_like(loss), entry]
    if not loss.requires_grad or not parameters:
        return {name: torch.zeros_like(p) for name, p in parameters.items()}
    grads = torch.autograd.grad(
        outputs, list(parameters.values()), upstream, retain_graph=True, allow_unused=True
    )
    return {
        name: torch.zeros_like(p) if g is None else g.detach()
        for (name, p), g in zip(parameters.items(), grads, strict=True)
    }


def _norm(g: Tensor) -> float:
    return float(g.double().norm())


def _along(g: Tensor, plain: Tensor) -> float:
    """The factor f for which f * plain is nearest to g."""
    plain = plain.double()
    return float((g.double() * plain).sum() / plain.square().sum())


def _near(a: float, b: float) -> bool:
    return abs(a - b) <= 0.02 * abs(b)


def _some(names: Collection[str], most: int = 3) -> str:
    shown = ", ".join(sorted(names)[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _bypassing(
    tensors: Iterable[Tensor], parameters: Mapping[str, Tensor], leaves: Sequence[Tensor]
) -> set[str]:
    """Parameters of what is computed from the data and reaches the logits without any modulate."""
    inputs = {id(x) for x in leaves}
    data: dict[Any, bool] = {}  # by node: whether data reach it beside the modulates
    marked: dict[Any, bool] = {}  # whether a modulate is behind it
    todo = [(x.grad_fn, False) for x in tensors if x.grad_fn is not None]
    while todo:  # depth first, children before their parents
        node, done = todo.pop()
        behind = (
            []
            if graph.is_modulate(node)
            else [child for child, _ in node.next_functions if child is not None]
        )
        if not done:
            if node not in data:
                todo += [(node, True), *((child, False) for child in behind if child not in data)]
            continue
        marked[node] = graph.is_modulate(node) or any(marked.get(child, False) for child in behind)
        data[node] = (
            id(getattr(node, "variable", None)) in inputs
            or node.name() in _EMBEDDINGS
            or any(data.get(child, False) for child in behind)
        )
    outside = {node for node, reached in data.items() if reached and not marked[node]}
    roots = [x.grad_fn for x in tensors]
    computing = {id(n.variable) for n in graph.walk(outside) if hasattr(n, "variable")}
    # a head that is used on features beside modulate too is no encoder: its parameters are reached without
    # these
    heads = {
        id(n.variable)
        for n in graph.walk(roots, lambda n: n in outside or graph.is_modulate(n))
        if hasattr(n, "variable")
    }
    return {name for name, p in parameters.items() if id(p) in computing - heads}
