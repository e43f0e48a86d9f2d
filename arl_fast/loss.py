"""The loss: ``ARLLoss`` as a module, with presets, and ``arl_loss`` as a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor, nn

from ._autograd.linear import linear_loss_and_packed
from ._autograd.loss import loss_and_packed
from ._core import wiring
from ._core.branches import BranchLogits, Targets, Unimodal, as_branch_logits, mask_of
from ._core.checks import LinearHead
from ._core.options import (
    LossOptions,
    Schedule,
    check_gamma,
    check_scalar,
    make_options,
    make_schedule,
    make_temperature,
    with_options,
)
from ._core.spec import BranchStats
from ._core.stats import unpack
from .implementations import dispatch

if TYPE_CHECKING:
    from .history import History


@with_options
def arl_loss(
    fused: Tensor,
    unimodal: Unimodal,
    target: Tensor,
    link: Tensor | None = None,
    gamma: float | Sequence[float] | Tensor = 1.0,
    temperature: float | Tensor | None = None,
    rule: str | Callable[[BranchStats], Tensor] = "share",
    *,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    mask: Tensor | None = None,
    warming: bool | Tensor = False,
    sync_stats: bool | Any = False,
    implementation: Any = None,
    **options: Unpack[LossOptions],
) -> tuple[Tensor, BranchStats]:
    """L = CE(fused, y) + sum_m gamma_m CE(unimodal_m, y) (Eq. 22), its statistics, and the encoders' gains.

    Args:
        fused: [B, C] or [B, C, d1, ...] logits of the whole model, float16 to float64. Read only.
        unimodal: logits of the same shape, dtype and device from the same head, one per modality; dict or
            sequence.
        target: class indices [B, d1, ...] (int64, int32) or class probabilities of the logits' shape; for
            task "multilabel" labels of the logits' shape in [0, 1], NaN where one is not known.
        link: the second result of ``modulate``; while gradients are recorded required by every rule but
            "none". Only ``ARLLoss`` looks whether it leads to an encoder.
        gamma: weight of the unimodal losses: a number >= 0, one per modality, or a tensor [] or [M].
        temperature: T of the rule, a number or a 0-d tensor; None: 8. 0 gives uniform coefficients, below 0
            reverses the rule. For rule "ogm" it is alpha >= 0; None: 0.1.
        rule: "share", "paper" (two modalities), "constant", "none", "ogm", or a callable from BranchStats to
            coefficients [M].
        weight: [C] class weights, as in ``torch.nn.functional.cross_entropy``, or weights of the labels.
        pos_weight: [C] for task "multilabel": what multiplies the loss of a "yes".
        mask: [B, M] bool, False where a modality is absent: those rows leave its loss and its statistics.
        warming: True, or a 0-d bool tensor, while the warm-up lasts: gamma = 1 and all gains 1.
        sync_stats: True, or a process group: statistics and mean over all processes (torch.distributed).
        implementation: an object with the functions of docs/architecture.md; None: the one that ``python -m
            arl_fast`` names.
        task: "multiclass", one class per row, or "multilabel", a yes or no for every label (C = 1: binary).
        dependence: "confidence", the mean true-class probability, or "logit_l1", the mean sum of absolute
            logits.
        entropy_floor: smallest entropy share before the inversion, in [0, 1]; None: 0.6 / number of
            modalities.
        gain: "residual" 1 + a_m (Eq. 19), "mean_one" M a_m, or "plain" a_m; rule "ogm" has no other than
            "plain".
        ignore_index, label_smoothing, reduction: as in ``torch.nn.functional.cross_entropy``, for each
            branch.

    Returns:
        loss: 0-d, or for reduction "none" [B, d1, ...] (task "multilabel": [B, C, d1, ...]); float32 (float64
            for float64 logits).
        stats: BranchStats, detached, on the logits' device; nothing is read back to the host.

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype, shape, device or range, or a missing link; on
            a CPU, and not when compiled, probabilities whose sum differs from 1 by more than 0.01. Elsewhere
            these count as they are, as in torch.
        IndexError: a class index out of range, on a CPU. On a GPU, and when compiled, that row's loss is NaN.
    """
    loss, packed = loss_and_packed(
        BranchLogits(fused, unimodal, link),
        Targets(target, mask, weight, pos_weight=pos_weight),
        make_schedule(gamma, temperature, warming, rule),
        make_options(rule=rule, **options),
        sync_stats,
        implementation,
    )
    return loss, _stats_of(packed)


def _stats_of(packed: Tensor) -> BranchStats:
    """Packed vector -> BranchStats, which share its memory."""
    native = dispatch.native_steps()
    parts = None if native is None else native.fast_unpack(packed)
    return unpack(packed) if parts is None else BranchStats._make(parts)


# gamma and T of the paper's experiments; no floor, Eq. 18. Its three-modality data set needs a rule that
# takes three.
_PAPER: dict[str, dict[str, Any]] = {
    "crema-d": dict(gamma=4.0, temperature=8.0, rule="paper"),
    "ave": dict(gamma=4.0, temperature=4.0, rule="paper"),
    "ks": dict(gamma=4.0, temperature=4.0, rule="paper"),
    "mosi": dict(gamma=4.0, temperature=4.0, rule="share"),
    "ucf101": dict(gamma=4.0, temperature=4.0, rule="paper"),
}
# --gamma and --T of the release's scripts; T is inert there, since the coefficients stay at their initial
# 0.5.
_RELEASE: dict[str, dict[str, Any]] = {
    "crema-d": dict(gamma=4.0, temperature=8.0),
    "ave": dict(gamma=5.0, temperature=4.0),
    "ks": dict(gamma=3.0, temperature=4.0),
}
_RELEASE_RULE: dict[str, Any] = dict(rule="constant", dependence="logit_l1", entropy_floor=0.3)


def _accept_checkpoint_without_criterion(module: nn.Module, state: dict, prefix: str, *_: Any) -> None:
    """A state_dict with nothing of this submodule is from before it was added: it keeps its buffers."""
    if prefix and not any(name.startswith(prefix) for name in state):
        state.update({prefix + name: buffer for name, buffer in module.named_buffers()})


class ARLLoss(nn.Module):
    """Asymmetric Representation Learning as a loss: ``loss = criterion(head(features), target)``.

    Args:
        gamma: weight of the unimodal losses (Eq. 22): a number >= 0, one per modality, or a tensor [] or [M].
        temperature: T of the rule, a number or a 0-d tensor; None: 8, and for "ogm", whose alpha it is, 0.1.
        rule: "share", "paper", "constant", "none", "ogm" (with gamma=0: OGM, docs/family.md), or a callable
            from BranchStats to coefficients [M].
        warmup: number of calls in training mode, with gradients, before gamma and the gains take effect
            (until then gamma = 1 and gain = 1). The counter, the buffer ``steps``, is in the state_dict.
        weight, pos_weight: [C] weights of the classes or labels, as for ``arl_loss``; they move with the
            module and are in the state_dict.
        sync_stats: True, or a process group, for statistics and means over all processes.
        task, dependence, entropy_floor, gain, ignore_index, label_smoothing, reduction: as for ``arl_loss``.

    Shape:
        output: BranchLogits, a tuple (fused, unimodal[, link]) or a dict
            {"fused": ..., name: ..., "link": ...}, with logits [B, C] or [B, C, d1, ...]. In evaluation mode
            also the fused logits alone, for models that then return nothing else.
        target: class indices [B, d1, ...], or probabilities or labels of the logits' shape.
        mask: [B, M] bool, False where a modality is absent; optional. In a dict it may be the entry "mask".

    ``stats`` holds the BranchStats of the last call (None before the first), ``modalities`` the names in its
    unimodal logits (None for a sequence). Errors are those of ``arl_loss``. The first training step also
    looks at how the model is wired: a link that leads past the logits, or a gain that would act twice, is an
    error; a gain without effect, of a detached link or under an optimiser of Adam's kind, is a warning.
    ``arl_fast.check`` measures the rest.

    A checkpoint from before the criterion became a submodule loads strictly: the criterion then keeps its own
    ``steps``.
    """

    steps: Tensor
    weight: Tensor | None
    pos_weight: Tensor | None
    _unseen = True

    if TYPE_CHECKING:

        def __call__(self, output: Any, target: Tensor, mask: Tensor | None = None) -> Tensor: ...

    @with_options
    def __init__(
        self,
        gamma: float | Sequence[float] | Tensor = 1.0,
        temperature: float | Tensor | None = None,
        rule: str | Callable[[BranchStats], Tensor] = "share",
        *,
        warmup: int = 0,
        weight: Tensor | None = None,
        pos_weight: Tensor | None = None,
        sync_stats: bool | Any = False,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__()
        self.options = make_options(rule=rule, **options)
        check_gamma(gamma)
        temperature = make_temperature(temperature, rule)
        check_scalar("temperature", temperature)
        if isinstance(warmup, bool) or not isinstance(warmup, int) or warmup < 0:
            raise ValueError(f"warmup: got {warmup!r}, expected a number of steps >= 0")
        for name, value in {"weight": weight, "pos_weight": pos_weight}.items():
            if value is not None and not isinstance(value, Tensor):
                raise TypeError(f"{name}: got {type(value).__name__}, expected a Tensor [C] of weights")
        if pos_weight is not None and self.options.task != "multilabel":
            raise ValueError("pos_weight: got one with task='multiclass', expected task='multilabel'")
        self.gamma = gamma if isinstance(gamma, (int, float, Tensor)) else tuple(gamma)
        self.temperature = temperature
        self.warmup = warmup
        self.sync_stats = sync_stats
        self.register_buffer("weight", weight)
        self.register_buffer("pos_weight", pos_weight)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._packed: Tensor | None = None
        self._unseen = True  # until its first training step, in which wiring.look does
        self.register_load_state_dict_pre_hook(_accept_checkpoint_without_criterion)
        self.modalities: tuple[str, ...] | None = None
        self.history: History | None = None

    @classmethod
    def paper(cls, dataset: str, **changes: Any) -> ARLLoss:
        """The paper's settings for "crema-d", "ave", "ks", "mosi" or "ucf101"; ``changes`` override them.

        Eq. 18 is defined for two modalities. For the three of "mosi" the share rule takes its place. "mosi"
        is the classification variant of that data set: targets are classes of sentiment. For its scores, a
        regression, there is no probability of the true class and no entropy; ``apply_gains`` takes gains of
        your own there.
        """
        return cls._preset("paper", _PAPER, dataset, changes)

    @classmethod
    def release(cls, dataset: str, **changes: Any) -> ARLLoss:
        """What the release's scripts for "crema-d", "ave" or "ks" would do if they ran, with ``changes``.

        The release warms up during its epochs 0 to 5: pass ``warmup=6 * len(loader)``. See docs/errata.md.
        """
        return cls._preset("release", _RELEASE, dataset, _RELEASE_RULE | changes)

    @classmethod
    def _preset(cls, kind: str, presets: dict[str, dict], dataset: str, changes: dict[str, Any]) -> ARLLoss:
        if dataset not in presets:
            known = ", ".join(map(repr, presets))
            raise ValueError(f"dataset: got {dataset!r}, expected one of {known} for ARLLoss.{kind}")
        settings = {**presets[dataset], **changes}
        if settings["rule"] == "ogm" and "temperature" not in changes:
            del settings["temperature"]  # T is not OGM's alpha
        return cls(**settings)

    @property
    def stats(self) -> BranchStats | None:
        """BranchStats of the last call: detached tensors on the device. Reading their values synchronises."""
        return None if self._packed is None else _stats_of(self._packed)

    def metrics(self, prefix: str = "arl/") -> dict[str, Tensor]:
        """The last call's statistics by name, as "arl/gain/audio": detached 0-d tensors on the device."""
        from .history import metrics

        return metrics(self.stats, self.modalities, prefix)

    def track(self, history: History | None = None, **options: Any) -> History:
        """Let a History collect every call from now on: training calls as steps, others as held-out batches.

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
        native = dispatch.native_steps()
        if native is not None:
            loss = native.fast_criterion(self, output, target, mask)
            if loss is not None:  # None where anything is unusual or wrong
                return loss
        if not self.training and isinstance(output, Tensor):
            return self._plain(output, target)
        if mask is None:
            mask = mask_of(output)
        branches = as_branch_logits(output)
        schedule = self._schedule(branches.fused)
        loss, packed = loss_and_packed(
            branches, self._targets(target, mask), schedule, self.options, self.sync_stats
        )
        self._remember(packed, branches.unimodal)
        if self._unseen and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            fused, unimodal, link = branches
            logits = [fused, *(unimodal.values() if isinstance(unimodal, Mapping) else unimodal)]
            self._unseen = not wiring.look(self, self.options, logits, link)
        return loss

    def _plain(self, fused: Tensor, target: Tensor) -> Tensor:
        """The cross-entropy of fused logits alone, as a model may return in evaluation. No statistics."""
        self._packed = self.modalities = None
        return loss_and_packed(
            BranchLogits(fused, [fused.detach()], None),
            self._targets(target, None),
            Schedule(0.0, 1.0),
            self.options._replace(rule="none"),
        )[0]

    def linear(
        self,
        features: Mapping[str, Tensor] | Sequence[Tensor],
        weights: Tensor | Mapping[str, Tensor] | Sequence[Tensor],
        bias: Tensor | Mapping[str, Tensor] | Sequence[Tensor] | None,
        target: Tensor,
        mask: Tensor | None = None,
        *,
        fusion: str = "concat",
        bias_mode: str = "full",
        chunk: int | None = None,
    ) -> Tensor:
        """The loss behind a linear head, without its logits: ``linear_arl_loss`` with these settings.

        The matrices stay in the user's head. ``ConcatHead``, ``SumHead`` and ``SharedHead`` call this with
        their own: ``head.loss(features, target, criterion)``.

        Args:
            features, weights, bias, target, mask, fusion, bias_mode, chunk: as for ``linear_arl_loss``.
        """
        loss, packed, _ = linear_loss_and_packed(
            LinearHead(features, weights, bias, fusion, bias_mode, chunk),
            self._targets(target, mask),
            self._schedule(target),
            self.options,
            self.sync_stats,
        )
        self._remember(packed, features)
        if self._unseen and not torch.compiler.is_compiling():
            given = features.values() if isinstance(features, Mapping) else features
            self._unseen = not wiring.look_at_linear(self, self.options, list(given))
        return loss

    def _targets(self, target: Tensor, mask: Tensor | None) -> Targets:
        buffers = self._buffers  # nn.Module's own way to them costs as much as a small evaluation
        return Targets(target, mask, buffers["weight"], None, buffers["pos_weight"])

    def _remember(self, packed: Tensor, modalities: Any) -> None:
        """Keep the statistics and the names of this call, and count it where it counts for the warm-up."""
        # past nn.Module's own setter, which takes microseconds
        object.__setattr__(self, "_packed", packed)
        object.__setattr__(self, "modalities", tuple(modalities) if isinstance(modalities, dict) else None)
        if self.warmup and self.training and torch.is_grad_enabled():
            self.steps.add_(1)  # after the loss has read it
        if self.history is not None:
            self.history.observe(self)

    def _schedule(self, like: Tensor) -> Schedule:
        """This step's numbers. The warm-up is counted on the device: no host read and no recompilation."""
        if not self.warmup:
            return Schedule(self.gamma, self.temperature)
        if (
            isinstance(like, Tensor)
            and self.steps.device != like.device
            and not torch.compiler.is_compiling()
        ):
            self.steps = self.steps.to(like.device)
        return Schedule(self.gamma, self.temperature, self.warmup, self.steps)

    def extra_repr(self) -> str:
        shown = self.options._asdict() | {
            "gamma": self.gamma,
            "temperature": self.temperature,
            "warmup": self.warmup,
        }
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())
