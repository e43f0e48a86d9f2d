"""Gains on the update instead of the gradient, for optimizers that cancel a constant scale of the gradient.

Adam, AdamW and their relatives divide a gradient by a running estimate of its size, so that an encoder whose
gradient is multiplied by 1.5 in every step makes the same steps as without; only changes of the gain that are
faster than this estimate pass through (docs/loops.md shows it). ``UpdateGains`` multiplies the learning rates
instead, which no optimizer cancels; ``detach_link`` keeps the gradients as they are, so that the gain is not
applied twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._core import wiring
from ._core.branches import BranchLogits, as_branch_logits, mask_of
from ._core.dtypes import compute_dtype
from .loss import ARLLoss


def detach_link(output: Any) -> BranchLogits:
    """The same logits with a link that leads nowhere: the loss computes gains, and scales no gradient.

    Args:
        output: whatever ``ARLLoss`` takes: BranchLogits, a tuple or a dict; the link may be missing.
    """
    fused, unimodal, link = as_branch_logits(output)
    if link is None:
        link = torch.zeros(len(unimodal), dtype=compute_dtype(fused.dtype), device=fused.device)
    detached: Any = link.detach()
    if not torch.compiler.is_compiling():
        detached.__dict__.update(link.__dict__)  # the names of the modalities
        detached.mask = mask_of(output)
        detached.detached = True  # for wiring.look
    return BranchLogits(fused, unimodal, detached)


class UpdateGains:
    """Multiplies the learning rates of each modality's parameter groups by its gain, in every step.

        optimizer = torch.optim.AdamW([
            {"params": audio_encoder.parameters()},
            {"params": visual_encoder.parameters()},
            {"params": head.parameters()},
        ], lr=1e-3)
        gains = UpdateGains(optimizer, {"audio": 0, "visual": 1}, criterion)
        ...
        criterion(detach_link(model(x)), target).backward()
        optimizer.step()

    Nothing else changes: the gains are applied as the optimizer's step begins and taken back as it ends, so
    learning-rate schedulers, checkpoints and loggers see the learning rates they know. The gains are those of
    the criterion's last call (of several micro-batches: of the last one); before the first call they are 1.
    They stay on their device: the learning rate of a step is a 0-d tensor, which all optimizers of torch take
    but LBFGS and SparseAdam. On a GPU give Adam and its relatives ``capturable=True`` or ``fused=True``, or
    they read it back to the host. Decoupled weight decay is a part of the update and scales with it.

    Without ``detach_link`` the gain would act on the gradient too: the criterion raises an error in its first
    step then, and warns of ``detach_link`` without an ``UpdateGains``.

    Args:
        optimizer: any ``torch.optim.Optimizer`` with learning rates, numbers or tensors, in its groups.
        groups: index of the parameter group, or a sequence of them, by modality: a dict by name, or a
            sequence in the order of the unimodal logits. A modality may be left out of a dict, and have no
            group in a sequence (``()``).
        criterion: the ``ARLLoss`` (or whatever has its ``stats``, and its ``modalities`` for a dict) whose
            gains are used.

    Raises:
        TypeError, ValueError, IndexError: groups of another kind, a group that is not there or belongs to two
            modalities; in a step: a modality that the criterion does not know.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        groups: Mapping[str, int | Sequence[int]] | Sequence[int | Sequence[int]],
        criterion: Any,
    ) -> None:
        if isinstance(groups, str) or not isinstance(groups, (Mapping, Sequence)):
            raise TypeError(
                f"groups: got {type(groups).__name__}, expected indices of parameter groups by modality, "
                "dict or sequence"
            )
        named: list[tuple[Any, Any]] = (
            list(groups.items()) if isinstance(groups, Mapping) else list(enumerate(groups))
        )
        self.optimizer = optimizer
        self.criterion = criterion
        self.by_name = isinstance(groups, Mapping)
        self.groups = {name: (own,) if isinstance(own, int) else tuple(own) for name, own in named}
        self._base: dict[int, float | Tensor] = {}
        seen: dict[int, Any] = {}
        for name, own in self.groups.items():
            for index in own:
                if isinstance(index, bool) or not isinstance(index, int):
                    raise TypeError(
                        f"groups[{name!r}]: got {type(index).__name__}, expected the index of a parameter "
                        "group"
                    )
                if not 0 <= index < len(optimizer.param_groups):
                    raise IndexError(
                        f"groups[{name!r}]: got {index}, but the optimizer has "
                        f"{len(optimizer.param_groups)} parameter groups"
                    )
                if index in seen:
                    raise ValueError(
                        f"groups[{name!r}]: got {index}, which modality {seen[index]!r} has as well"
                    )
                seen[index] = name
        if isinstance(criterion, ARLLoss):  # so that it can tell whether its gains act, and once
            wiring.set_updates(criterion, self)
            criterion._unseen = True
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def remove(self) -> None:
        """Leave the optimizer as it was."""
        if isinstance(self.criterion, ARLLoss):
            wiring.set_updates(self.criterion, None)
            self.criterion._unseen = True
        for hook in self._hooks:
            hook.remove()

    def gains(self) -> dict[Any, Tensor]:
        """The gains of the criterion's last call by modality, 0-d tensors; empty before the first call."""
        stats = self.criterion.stats
        if stats is None:
            return {}
        if not self.by_name:
            if len(self.groups) != len(stats.gains):
                raise ValueError(
                    f"groups: got {len(self.groups)} modalities, but the criterion has {len(stats.gains)}"
                )
            return dict(enumerate(stats.gains.unbind()))
        names = self.criterion.modalities
        if names is None or not set(self.groups) <= set(names):
            known = (
                "logits without names, expected groups as a sequence in their order"
                if names is None
                else f"{list(names)}"
            )
            raise ValueError(
                f"groups: got the modalities {list(self.groups)}, but the criterion was given {known}"
            )
        return dict(zip(names, stats.gains.unbind(), strict=True))

    def _before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._after(optimizer)  # a step that raised has left its learning rates behind
        gains = self.gains()
        for name, own in self.groups.items() if gains else ():
            for index in own:
                group = optimizer.param_groups[index]
                self._base[index] = group["lr"]
                group["lr"] = group["lr"] * gains[name]

    def _after(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for index, lr in self._base.items():
            optimizer.param_groups[index]["lr"] = lr
        self._base.clear()
