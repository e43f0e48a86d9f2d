"""What a criterion looks at once, in its first training step: do its gains reach encoders, and once only?

A wrong wiring stays silent otherwise, and the statistics vouch for gains that nobody got. The graph is walked
once per criterion, so that a step costs nothing. ``arl_fast.check`` measures what a graph cannot tell.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from . import graph
from .options import Options

# The criteria whose gains an UpdateGains puts on the update, with that object; its optimiser keeps it alive.
_updates: weakref.WeakKeyDictionary[Any, weakref.ref] = weakref.WeakKeyDictionary()


def set_updates(criterion: Any, updates: Any) -> None:
    """Remember the UpdateGains of a criterion, or with None that there is none any more."""
    if updates is None:
        _updates.pop(criterion, None)
    else:
        _updates[criterion] = weakref.ref(updates)


def updates_of(criterion: Any) -> Any:
    """The UpdateGains of a criterion, or None."""
    reference = _updates.get(criterion)
    return None if reference is None else reference()


_DETACHED = "call criterion(arl_fast.optim.detach_link(output), target)"

# Parts of the names of optimisers whose step does not depend on a constant scale of the gradient, in lower
# case.
_CANCELLING = (
    *("adam", "adan", "adagrad", "adadelta", "adafactor", "adabelief", "rmsprop", "rprop", "lion", "lamb"),
    *("muon", "prodigy", "sophia", "novograd", "shampoo", "soap"),
)


def cancels_gains(optimizer: Any) -> bool:
    """Whether an optimiser is of the kind that divides a gradient by its size, by its classes' names."""
    names = [cls.__name__.lower() for cls in type(optimizer).__mro__]
    return any(part in name for name in names for part in _CANCELLING)


def look(criterion: Any, options: Options, logits: Sequence[Tensor], link: Tensor | None) -> bool:
    """Raise or warn if the wiring of this call is wrong. Returns whether there was anything to see."""
    if not options.scales:
        return True
    if link is None or not torch.is_grad_enabled() or not any(x.requires_grad for x in logits):
        return False
    updates = updates_of(criterion) is not None
    if not link.requires_grad:
        if not updates:
            warnings.warn(why_no_gradient(link), stacklevel=5)
        return True
    if updates:
        raise ValueError(
            "link: got one that scales gradients, while UpdateGains puts the gains of this criterion on "
            f"the update: they would act twice (2.25 in the place of 1.5); {_DETACHED}"
        )
    if link.grad_fn is None:  # a leaf: its owner wants the gains themselves
        return True
    modulates = graph.modulates_behind([link])
    # where a compiler has hidden modulate, some node that the link and the logits have in common must do
    sources = set(modulates or (node for node in graph.walk([link.grad_fn]) if not hasattr(node, "variable")))
    if not any(node in sources for node in graph.walk([x.grad_fn for x in logits], sources.__contains__)):
        raise ValueError(
            "link: got one whose modulate took no part in these logits, so that its gains would scale "
            "nothing: compute the logits from the features that modulate returned together with this link, "
            "in this step"
        )
    _watch([group for node in modulates for group in graph.features_of(node)])
    return True


def look_at_linear(criterion: Any, options: Options, features: Sequence[Tensor]) -> bool:
    """The same for a linear head and the loss in one, which needs no link and cannot be given a wrong one."""
    if not options.scales:
        return True
    if not torch.is_grad_enabled() or not any(z.requires_grad for z in features):
        return False
    if updates_of(criterion) is not None:
        raise ValueError(
            "features: got some whose gradients the linear loss scales, while UpdateGains puts the gains "
            "of this criterion on the update: they would act twice (2.25 in the place of 1.5); with the "
            f"logits of a head, {_DETACHED}"
        )
    _watch([[z.grad_fn] for z in features])
    return True


def why_no_gradient(link: Tensor) -> str:
    if getattr(link, "detached", False):
        return (
            "link: got that of detach_link, but no UpdateGains was given this criterion, so that its gains "
            "have no effect: UpdateGains(optimizer, groups, criterion) puts them on the update; without "
            "detach_link they scale gradients"
        )
    return (
        "link: got one that leads to no encoder, so that the gains have no effect: all encoders are frozen "
        "or their features detached before modulate, modulate was called without gradients, or the link is "
        "not modulate's. rule='none' says so"
    )


# ---- the first step of the optimiser -----------------------------------------------------------------------

# Per criterion, until an optimiser has stepped them: one parameter of each encoder.
_watched: list[list[weakref.ref[Tensor]]] = []
_hook: Any = None


def _watch(encoders: Sequence[Sequence[Any]]) -> None:
    """Look at the optimiser that first steps a parameter of these encoders, given as their last nodes."""
    global _hook
    found = (next((n.variable for n in graph.walk(own) if hasattr(n, "variable")), None) for own in encoders)
    parameters = [weakref.ref(p) for p in found if p is not None]
    if parameters:
        _watched.append(parameters)
        # it stays: a hook cannot be removed while hooks run, and costs nothing while none is watched
        if _hook is None:
            _hook = register_optimizer_step_pre_hook(_look_at_optimizer)


def _forget(parameters: list[weakref.ref[Tensor]]) -> None:
    """By identity: equality of references to tensors would compare their elements."""
    _watched[:] = [own for own in _watched if own is not parameters]


def _look_at_optimizer(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for parameters in _watched.copy():
        alive = {id(p) for ref in parameters if (p := ref()) is not None}
        if not alive:
            _forget(parameters)
        elif any(id(p) in alive for group in optimizer.param_groups for p in group["params"]):
            _forget(parameters)
            if cancels_gains(optimizer):
                warnings.warn(
                    f"{type(optimizer).__name__} divides each gradient by a running estimate of its size, "
                    "which cancels most of ARL's gains: put them on the update with "
                    "arl_fast.optim.UpdateGains, or use SGD (docs/loops.md)",
                    stacklevel=3,
                )
