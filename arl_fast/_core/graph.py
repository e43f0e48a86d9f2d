"""Autograd's graph, as far as it tells how a model is wired.

It is walked where a call is unusual, in a criterion's first step, and by ``arl_fast.check``: never in every
step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

_MODULATE = ("_ModulateBackward", "ARLModulateBackward")  # of _autograd/link.py and csrc


def is_modulate(node: Any) -> bool:
    return node.name() in _MODULATE


def modalities_of(node: Any) -> int:
    """The length of a modulate node's link."""
    sizes = getattr(node, "sizes", None)
    return len(node.next_functions) if sizes is None else len(sizes)


def features_of(node: Any) -> list[list[Any]]:
    """The nodes that computed a modulate node's features, by modality; those of constants are left out."""
    sizes = getattr(node, "sizes", None) or [1] * len(node.next_functions)
    inputs = iter(node.next_functions)
    return [
        [child for child, _ in (next(inputs) for _ in range(size)) if child is not None] for size in sizes
    ]


def walk(roots: Iterable[Any], stop: Callable[[Any], bool] = lambda _: False) -> Iterator[Any]:
    """The nodes behind some nodes, these included, each once; nothing behind one where ``stop`` holds."""
    seen: dict[Any, None] = {}  # holds the nodes, so that no two have one identity
    todo = [node for node in roots if node is not None]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen[node] = None
        yield node
        if not stop(node):
            todo.extend(child for child, _ in reversed(node.next_functions) if child is not None)


def modulates_behind(tensors: Iterable[Tensor]) -> list[Any]:
    """The nearest modulate nodes behind some tensors."""
    return [node for node in walk([x.grad_fn for x in tensors], is_modulate) if is_modulate(node)]


def is_gathered(link: Tensor, modalities: int) -> bool:
    """Whether a link consists of the links of several replicas, each with one entry for each of M modalities.

    DataParallel concatenates what its replicas return. A gathered link has lost the names of its modalities,
    but its graph leads to one ``modulate`` per replica. A link that needs no gradient scales nothing and may
    have any number of parts.
    """
    if link.dim() != 1 or link.shape[0] == 0 or link.shape[0] % modalities or torch.compiler.is_compiling():
        return False
    if not link.requires_grad:
        return True
    lengths = [modalities_of(node) for node in modulates_behind([link])]
    return set(lengths) == {modalities} and sum(lengths) == link.shape[0]
