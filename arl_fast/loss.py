"""ARLLoss: the loss as a module, with the presets of the paper and of its release."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .branches import as_branch_logits
from .functional import packed_loss
from .options import check_scalar, make_options
from .stats import BranchStats, unpack

if TYPE_CHECKING:
    from .history import History

# gamma and T of the paper's experiments; no floor, Eq. 18. Its three-modality data set needs a rule that takes three.
_PAPER = {
    "crema-d": dict(gamma=4.0, temperature=8.0, rule="paper"),
    "ave": dict(gamma=4.0, temperature=4.0, rule="paper"),
    "ks": dict(gamma=4.0, temperature=4.0, rule="paper"),
    "mosi": dict(gamma=4.0, temperature=4.0, rule="share"),
    "ucf101": dict(gamma=4.0, temperature=4.0, rule="paper"),
}
# --gamma and --T of the release's scripts; T is inert there, since the coefficients stay at their initial 0.5.
_RELEASE = {
    "crema-d": dict(gamma=4.0, temperature=8.0),
    "ave": dict(gamma=5.0, temperature=4.0),
    "ks": dict(gamma=3.0, temperature=4.0),
}


class ARLLoss(nn.Module):
    """Asymmetric Representation Learning as a loss: ``loss = criterion(head(features), target)``.

    Args:
        gamma: weight of the unimodal losses (Eq. 22), a number >= 0 or a 0-d tensor.
        temperature: T of the rule, a number or a 0-d tensor.
        rule: "share", "paper", "constant", "none", or a callable from BranchStats to coefficients [M].
        dependence: "confidence" or "logit_l1".
        entropy_floor: smallest entropy share before the inversion; None: 0.6 / number of modalities.
        gain: "residual" 1 + a_m, "mean_one" M a_m or "plain" a_m.
        warmup: number of calls in training mode, with gradients, before gamma and the gains take effect (until then gamma = 1 and
            gain = 1). The counter, the buffer ``steps``, is in the state_dict.
        weight: [C] class weights; moves with the module and is in the state_dict.
        ignore_index, label_smoothing, reduction: as in ``torch.nn.CrossEntropyLoss``.
        sync_stats: True, or a process group, for statistics and means over all processes.

    Shape:
        output: BranchLogits, a tuple (fused, unimodal[, link]) or a dict {"fused": ..., name: ..., "link": ...}, with
            logits [B, C] or [B, C, d1, ...].
        target: class indices [B, d1, ...] or probabilities of the logits' shape.
        mask: [B, M] bool, False where a modality is absent; optional.

    ``stats`` holds the BranchStats of the last call (None before the first), ``modalities`` the names in its unimodal logits
    (None for a sequence). Errors are those of ``arl_loss``.
    """

    steps: Tensor
    weight: Tensor | None

    def __init__(
        self,
        gamma: float | Tensor = 1.0,
        temperature: float | Tensor = 8.0,
        rule: str | Callable[[BranchStats], Tensor] = "share",
        dependence: str = "confidence",
        entropy_floor: float | None = None,
        gain: str = "residual",
        warmup: int = 0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        sync_stats: bool | Any = False,
    ) -> None:
        super().__init__()
        self.options = make_options(rule, dependence, entropy_floor, gain, ignore_index, label_smoothing, reduction)
        check_scalar("gamma", gamma, 0.0)
        check_scalar("temperature", temperature)
        if isinstance(warmup, bool) or not isinstance(warmup, int) or warmup < 0:
            raise ValueError(f"warmup: got {warmup!r}, expected a number of steps >= 0")
        if weight is not None and not isinstance(weight, Tensor):
            raise TypeError(f"weight: got {type(weight).__name__}, expected a Tensor [C] of class weights")
        self.gamma = gamma
        self.temperature = temperature
        self.warmup = warmup
        self.sync_stats = sync_stats
        self.register_buffer("weight", weight)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._packed: Tensor | None = None
        self.modalities: tuple[str, ...] | None = None
        self.history: History | None = None

    @classmethod
    def paper(cls, dataset: str, **changes: Any) -> ARLLoss:
        """The settings that the paper names for "crema-d", "ave", "ks", "mosi" or "ucf101"; ``changes`` override them.

        Eq. 18 is defined for two modalities; for the three of "mosi" the share rule takes its place.
        """
        return cls._preset("paper", _PAPER, dataset, changes)

    @classmethod
    def release(cls, dataset: str, **changes: Any) -> ARLLoss:
        """What the authors' scripts for "crema-d", "ave" or "ks" would do if they ran; ``changes`` override it.

        The release warms up during its epochs 0 to 5: pass ``warmup=6 * len(loader)``. See docs/errata.md.
        """
        fixed = dict(rule="constant", dependence="logit_l1", entropy_floor=0.3)
        return cls._preset("release", {name: fixed | own for name, own in _RELEASE.items()}, dataset, changes)

    @classmethod
    def _preset(cls, kind: str, presets: dict[str, dict], dataset: str, changes: dict[str, Any]) -> ARLLoss:
        if dataset not in presets:
            raise ValueError(f"dataset: got {dataset!r}, expected one of {', '.join(map(repr, presets))} for ARLLoss.{kind}")
        return cls(**{**presets[dataset], **changes})

    @property
    def stats(self) -> BranchStats | None:
        """BranchStats of the last call: detached device tensors; reading them is what synchronises, if anything does."""
        return None if self._packed is None else unpack(self._packed)

    def metrics(self, prefix: str = "arl/") -> dict[str, Tensor]:
        """The last call's statistics by name, as "arl/gain/audio": detached 0-d device tensors, as ``self.log_dict`` takes them."""
        from .history import metrics

        return metrics(self.stats, self.modalities, prefix)

    def track(self, history: History | None = None, **options: Any) -> History:
        """Let a History collect every call from now on: training calls as steps, the others as held-out batches.

        Args:
            history: None makes one, with ``options``.
        """
        if history is None:
            from .history import History

            history = History(**options)
        elif options:
            raise ValueError(f"track: got a history and {sorted(options)}, which are options of a new one")
        self.history = history
        return history

    def untrack(self) -> None:
        """End what ``track`` began."""
        self.history = None

    def forward(self, output: Any, target: Tensor, mask: Tensor | None = None) -> Tensor:
        fused, unimodal, link = as_branch_logits(output)
        loss, packed = packed_loss(
            fused,
            unimodal,
            target,
            link,
            mask,
            self.weight,
            self.gamma,
            self.temperature,
            self._warming(fused),
            self.options,
            self.sync_stats,
        )
        self._remember(packed, unimodal)
        return loss

    def _remember(self, packed: Tensor, modalities: Any) -> None:
        """Keep the statistics and the names of this call; past nn.Module's own setter, which takes microseconds."""
        object.__setattr__(self, "_packed", packed)
        object.__setattr__(self, "modalities", tuple(modalities) if isinstance(modalities, dict) else None)
        if self.history is not None:
            self.history.observe(self)

    def _warming(self, like: Tensor) -> bool | Tensor:
        """Whether this call is one of the first ``warmup``; counts it in training mode, where gradients are recorded."""
        if not self.warmup:
            return False
        if isinstance(like, Tensor) and self.steps.device != like.device and not torch.compiler.is_compiling():
            self.steps = self.steps.to(like.device)
        warming = self.steps < self.warmup  # compared on the device: neither a host read nor a recompilation
        if self.training and torch.is_grad_enabled():
            self.steps.add_(1)
        return warming

    def extra_repr(self) -> str:
        shown = self.options._asdict() | {"gamma": self.gamma, "temperature": self.temperature, "warmup": self.warmup}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())
