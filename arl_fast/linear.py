"""Linear head and loss as one: features in, loss out, never more than a chunk of logits in memory.

With a linear head the unimodal predictions are pieces of the fused one, so one product per modality and pass serves all
M+1 branches. With z_m [N, D_m], W_m [C, D_m], own bias b_m [C] and g the gradients of the branches' logits:

    x_m  = z_m W_m^T + b_m                  fused x_f = sum_m z_m W_m^T + b (fusion "concat") or sum_m x_m ("sum", "shared")
    t_m  = g_f + g_m                        what reaches modality m's product, from its own branch and the fused one
    dz_m = gain_m t_m W_m                   dW_m = t_m^T z_m          db: column sums

The rows go to the implementation that dispatch.py chose, in chunks of a memory budget; the products to torch's BLAS.

* One chunk: the logits' gradients [N, C] are kept, and backward makes the products. The usual eager step on a CPU is one
  call of ``csrc/linear.cpp``, with an autograd node of its own.
* Several chunks: forward makes a chunk's logits, their gradients and the products at once and keeps the
  sums; backward multiplies these by the upstream gradient and the gains, which only the last chunk completes.
* Several chunks where a product must not be made before the upstream gradient is known: one such gradient per row
  (reduction "none"), float16, which needs the loss scale before it is rounded, or statistics of several processes.
  Backward then computes each chunk's logits again: M more products, the same memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import dispatch, rules
from .branches import BranchLogits, check_not_dtensor
from .functional import (
    _from_rows,
    _graph_is_kept,
    _mask_rows,
    _to_rows,
    prepare,
    refuse_second_derivatives,
    refuse_transforms,
)
from .loss import ARLLoss
from .options import Options, _choice, make_options
from .reference import compute_dtype
from .stats import BranchStats, link_gradient, unpack, unpack_sums

FUSIONS = ("concat", "sum", "shared")
BIAS_MODES = ("full", "split")
# Bytes that a chunk's logits and their gradients may take, by type of device. More rows make the products faster until
# they fill the machine, and a GPU needs many (docs/performance.md).
BUDGET = {"cpu": 128 << 20}
DEFAULT_BUDGET = 1 << 30

Tensors = Mapping[str, Tensor] | Sequence[Tensor]


class _Layout(NamedTuple):
    """What the tensors given to _LinearARL mean: ``modalities`` features, then ``weights`` matrices, then biases."""

    fusion: str
    bias_mode: str
    modalities: int
    weights: int
    dtype: torch.dtype  # of the products and the logits
    chunk: int  # rows
    return_logits: bool

    @property
    def full(self) -> bool:
        """One bias, which every branch gets once, the fused one too."""
        return self.fusion == "concat" and self.bias_mode == "full"

    def split(self, tensors: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """Features, weights, biases."""
        end = self.modalities + self.weights
        return list(tensors[: self.modalities]), list(tensors[self.modalities : end]), list(tensors[end:])

    def parts(self, rows: int) -> list[slice | None]:
        """The chunks of so many rows; None: all at once."""
        if self.chunk >= rows:
            return [None]
        return [slice(start, min(rows, start + self.chunk)) for start in range(0, rows, self.chunk)]

    def by_modality(self, weights: Sequence[Any], dims: Sequence[int]) -> list[Any]:
        """W_m [C, D_m]: columns of one matrix, the shared one M times, or each its own. None stays None."""
        if len(weights) > 1:
            return list(weights)
        if self.fusion == "shared" or weights[0] is None:
            return [weights[0]] * self.modalities
        return list(weights[0].split(list(dims), 1))

    def logits(self, features: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
        """Features [n, D_m] and W_m [C, D_m] -> the M+1 logits [n, C], the fused ones first."""
        own: list[Tensor | None] = [None] * self.modalities
        if self.full and biases:
            own[0] = biases[0]  # so that the sum of the parts has it once
        elif biases:
            own = [biases[0] / self.modalities if self.fusion == "concat" else biases[0]] * self.modalities
            own = own if len(biases) == 1 else list(biases)
        parts = [F.linear(z, w, b) for z, w, b in zip(features, weights, own, strict=True)]
        fused = parts[0]
        for m, part in enumerate(parts[1:]):
            fused = fused + part if m == 0 else fused.add_(part)
        if self.full and biases:
            parts[1:] = [part.add_(biases[0]) for part in parts[1:]]
        return [fused, *parts]


class _Sums:
    """Gradients of features, weights and biases, added up over chunks of rows.

    A sum of several products is kept in float32 (float64 for float64), a single product as the BLAS writes it.

    Args:
        layout: what the tensors are.
        tensors: features [N, D_m], weights and biases in the dtype of the products.
        needs: which of them get a gradient.
    """

    def __init__(self, layout: _Layout, tensors: Sequence[Tensor], needs: Sequence[bool]) -> None:
        self.layout = layout
        features, weights, biases = layout.split(tensors)
        self.needs_features, needs_weights, self.needs_biases = layout.split(needs)
        self.rows = features[0].shape[0]
        single = layout.chunk >= self.rows and layout.fusion != "shared"
        dtype = layout.dtype if single else compute_dtype(layout.dtype)
        self.features: list[Tensor | None] = [None] * len(features)
        self.weights = [torch.empty_like(w, dtype=dtype) if need else None for w, need in zip(weights, needs_weights, strict=True)]
        self.weights_by_modality = layout.by_modality(self.weights, [z.shape[1] for z in features])
        self.biases: list[Tensor | None] = [None] * len(biases)

    def add(self, part: slice | None, grads: Sequence[Tensor], features: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        """Add what the gradients [n, C] of some rows' logits give; these gradients are overwritten."""
        layout = self.layout
        first = part is None or part.start == 0
        fused, *own = grads
        if layout.full and self.biases:
            for g in grads:
                self._add_bias(0, g)
        for m, (g, z, w) in enumerate(zip(own, features, weights, strict=True)):
            total = g.add_(fused)
            if self.needs_features[m]:
                self._put_features(m, part, total, w)
            out = self.weights_by_modality[m]
            if out is not None:
                _add_product(out, total.t(), z, first and (m == 0 or layout.fusion != "shared"))
            if not layout.full and self.biases:
                self._add_bias(m if len(self.biases) > 1 else 0, total)

    def _put_features(self, m: int, part: slice | None, total: Tensor, w: Tensor) -> None:
        whole = self.features[m]
        if whole is None:
            whole = self.features[m] = total.new_empty(self.rows, w.shape[1])
        _add_product(_take(whole, part), total, w, True)

    def _add_bias(self, position: int, g: Tensor) -> None:
        if self.needs_biases[position]:
            column = g.sum(0, dtype=compute_dtype(g.dtype))
            if self.layout.fusion == "concat" and not self.layout.full:
                column = column / self.layout.modalities
            before = self.biases[position]
            self.biases[position] = column if before is None else before + column


def _add_product(out: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """out += a @ b; the first product overwrites."""
    if out.dtype == a.dtype:
        out.addmm_(a, b, beta=0 if first else 1)
    elif first:
        out.copy_(torch.mm(a, b))
    else:
        out.add_(torch.mm(a, b))


def _norm(
    target: Tensor, mask: Tensor | None, weight: Tensor | None, options: Options, dtype: torch.dtype, branches: int, group: Any
) -> Tensor:
    """[M+1]: what reduction "mean" divides the gradients of each branch by, over all rows (of all processes, per process)."""
    if target.is_floating_point():
        rows = torch.ones_like(target[:, 0], dtype=dtype)
    elif weight is None:
        rows = (target != options.ignore_index).to(dtype)
    else:  # a target out of range is reported, or poisons its row, where the row is computed
        rows = torch.where(target != options.ignore_index, weight[target.clamp(0, len(weight) - 1)], 0)
    columns = rows.unsqueeze(1).expand(-1, branches - 1) if mask is None else torch.where(mask, rows.unsqueeze(1), 0)
    norm = torch.cat([rows.sum().view(1), columns.sum(0)])
    if group is None:
        return norm
    from .distributed import _all_reduce

    return _all_reduce(norm, group) / group.size


class _LinearARL(torch.autograd.Function):
    """(features [N, D_m]..., weights..., biases...) -> loss, packed statistics and, if asked for, the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        recording: bool,
        implementation: ModuleType,
        layout: _Layout,
        options: Options,
        schedule: rules.Schedule,
        group: Any,
        target: Tensor,
        mask: Tensor | None,
        weight: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        needs = ctx.needs_input_grad[9:]
        grad = recording and any(needs)
        dtypes = [t.dtype for t in tensors]
        tensors = tuple(t.to(layout.dtype) for t in tensors)
        features, weights, biases = layout.split(tensors)
        weights = layout.by_modality(weights, [z.shape[1] for z in features])
        rows = features[0].shape[0]
        single = layout.chunk >= rows
        early = grad and not single and options.reduction != "none" and layout.dtype != torch.float16
        # a chunk knows neither the statistics of all rows, which the rule wants, nor what "mean" divides by
        alone = single and group is None
        local = options if alone else options._replace(rule="constant")
        norm = None
        if grad and not alone and options.reduction == "mean":
            norm = _norm(target, mask, weight, options, compute_dtype(layout.dtype), layout.modalities + 1, group)

        sums = _Sums(layout, tensors, needs) if early else None
        losses, statistics, pieces = [], [], []
        for part in layout.parts(rows):
            z = [_take(z, part) for z in features]
            logits = layout.logits(z, weights, biases)
            y, present = _take(target, part), None if mask is None else _take(mask, part)
            loss, packed, grads = implementation.forward(logits, y, present, weight, norm, schedule, local, early or (grad and single))
            if sums is not None:
                sums.add(part, grads, z, weights)
                grads = []
            losses.append(loss)
            statistics.append(packed)
            if layout.return_logits:
                pieces.append(logits)
            del logits  # before those of the next chunk are made
        if not single:
            loss, packed = rules.finish(torch.stack([unpack_sums(packed) for packed in statistics]).sum(0), schedule, options)
            if options.reduction == "none":
                loss = torch.cat(losses)
        if group is not None:
            from .distributed import synchronise

            loss, packed, _ = synchronise(loss, packed, schedule, options, group, norm)  # the norm has been that of all processes
        whole = [branch[0] if single else torch.cat(branch) for branch in zip(*pieces, strict=True)]

        if grad:
            ctx.implementation, ctx.layout, ctx.options, ctx.needs, ctx.dtypes = implementation, layout, local, needs, dtypes
            ctx.early = early
            link = link_gradient(packed) if options.scales else None
            if sums is not None:
                ctx.save_for_backward(link, *sums.features, *sums.weights, *sums.biases)
            else:
                on_device = schedule if isinstance(schedule, Tensor) else None
                ctx.schedule = None if isinstance(schedule, Tensor) else schedule
                ctx.kept = len(grads)
                ctx.save_for_backward(link, norm, on_device, target, mask, weight, *grads, *tensors)
        ctx.mark_non_differentiable(packed, *whole)
        return loss, packed, *whole

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Any, ...]:
        refuse_second_derivatives()
        if upstream is None:  # nothing depends on the loss
            return (None,) * (9 + len(ctx.needs))
        keep = torch.compiler.is_compiling() or _graph_is_kept()
        grads = _early_gradients(ctx, upstream, keep) if ctx.early else _late_gradients(ctx, upstream, keep)
        return (None,) * 9 + tuple(None if g is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))


def _take(x: Tensor, part: slice | None) -> Tensor:
    return x if part is None else x[part]


def _early_gradients(ctx: Any, upstream: Tensor, keep: bool) -> list[Tensor | None]:
    """The sums that forward has made, times the upstream gradient and, for the features, the gains."""
    link, *sums = ctx.saved_tensors
    grads: list[Tensor | None] = []
    for i, (g, dtype) in enumerate(zip(sums, ctx.dtypes, strict=True)):
        factor = upstream * (1 + link[i]) if link is not None and i < ctx.layout.modalities else upstream
        grads.append(None if g is None else _times(g, factor, keep).to(dtype))
    return grads


def _times(g: Tensor, factor: Tensor, keep: bool) -> Tensor:
    """g * factor in the factor's dtype, in place unless ``keep``."""
    wide = g.to(factor.dtype)
    return wide * factor if keep and wide is g else wide.mul_(factor)


def _late_gradients(ctx: Any, upstream: Tensor, keep: bool) -> list[Tensor | None]:
    """The products with the kept gradients of the logits or, where there are none, of logits that are computed again."""
    layout, implementation = ctx.layout, ctx.implementation
    link, norm, schedule, target, mask, weight, *rest = ctx.saved_tensors
    schedule = ctx.schedule if schedule is None else schedule
    kept, tensors = rest[: ctx.kept], rest[ctx.kept :]
    features, weights, biases = layout.split(tensors)
    weights = layout.by_modality(weights, [z.shape[1] for z in features])
    sums = _Sums(layout, tensors, ctx.needs)
    for part in layout.parts(features[0].shape[0]):
        z = [_take(z, part) for z in features]
        grads = kept
        if not kept:
            logits = layout.logits(z, weights, biases)
            y, present = _take(target, part), None if mask is None else _take(mask, part)
            _, _, grads = implementation.forward(logits, y, present, weight, norm, schedule, ctx.options, True)
            del logits
        u = _take(upstream, part) if upstream.dim() else upstream
        sums.add(part, implementation.scale(grads, u, None, layout.dtype, keep and len(kept) > 0), z, weights)
        grads = []
    if link is not None:
        gains = 1 + link
        sums.features = [None if g is None else _times(g, gains[m], False).to(g.dtype) for m, g in enumerate(sums.features)]
    return [*sums.features, *sums.weights, *sums.biases]


def _product_dtype(x: Tensor) -> torch.dtype:
    """What torch.nn.functional.linear would compute in: under autocast its dtype, but never for float64."""
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def _named(name: str, value: object, names: Sequence[Any]) -> dict[str, Any]:
    """One tensor per modality as {label: tensor} in the features' order."""
    if isinstance(value, Mapping):
        if set(value) != set(names):
            raise ValueError(f"{name}: got a dict with the keys {list(value)}, expected those of the features, {list(names)}")
        return {f"{name}[{key!r}]": value[key] for key in names}
    if isinstance(value, (Tensor, str)) or not isinstance(value, Sequence):
        raise TypeError(f"{name}: got {_what(value)}, expected a dict or a sequence of tensors, one per modality")
    if len(value) != len(names):
        raise ValueError(f"{name}: got {len(value)} tensors, expected one for each of the {len(names)} modalities")
    return {f"{name}[{i}]": x for i, x in enumerate(value)}


def _what(value: object) -> str:
    return f"a Tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _check_shape(label: str, value: object, shape: tuple[int | None, ...], meaning: str) -> None:
    fits = isinstance(value, Tensor) and value.dim() == len(shape)
    if not fits or any(want is not None and got != want for got, want in zip(value.shape, shape, strict=True)):  # type: ignore[attr-defined]
        raise (ValueError if isinstance(value, Tensor) else TypeError)(f"{label}: got {_what(value)}, expected {meaning}")


def _check(features: object, weights: object, bias: object, fusion: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Features, weights and biases by label, after checking type, shape, dtype and device."""
    if isinstance(features, Tensor) or not isinstance(features, (Mapping, Sequence)) or len(features) == 0:
        raise TypeError(f"features: got {_what(features)}, expected a dict or a sequence of tensors [B, D_m], one per modality")
    names: Sequence[Any] = list(features) if isinstance(features, Mapping) else range(len(features))
    z = _named("features", features, names)
    first = next(iter(z.values()))
    for label, x in z.items():
        if not isinstance(x, Tensor) or x.dim() < 2 or x.shape[:-1] != first.shape[:-1]:
            batch = list(first.shape[:-1]) if isinstance(first, Tensor) and first.dim() > 1 else ["B"]
            raise (ValueError if isinstance(x, Tensor) else TypeError)(
                f"{label}: got {_what(x)}, expected [{', '.join(map(str, batch))}, D_m] as of all modalities"
            )
    dims = [x.shape[-1] for x in z.values()]
    if fusion == "shared" and len(set(dims)) > 1:
        raise ValueError(f"features: fusion 'shared' needs one feature size for all modalities, got {dims}")

    if fusion == "shared":
        w = {"weights": weights}
        _check_shape("weights", weights, (None, dims[0]), f"[C, {dims[0]}] for fusion 'shared'")
    elif fusion == "concat" and isinstance(weights, Tensor):
        w = {"weights": weights}
        _check_shape("weights", weights, (None, sum(dims)), f"[C, {sum(dims)}], the columns of all modalities in order")
    else:
        w = _named("weights", weights, names)
        for (label, x), dim in zip(w.items(), dims, strict=True):
            _check_shape(label, x, (None, dim), f"[C, {dim}]")
    classes = next(iter(w.values())).shape[0]  # type: ignore[attr-defined]
    for label, x in w.items():
        _check_shape(label, x, (classes, None), f"C = {classes} rows, as the first")
    if bias is None:
        b: dict[str, Any] = {}
    elif fusion == "sum":
        b = _named("bias", bias, names)
    else:
        b = {"bias": bias}
    for label, x in b.items():
        _check_shape(label, x, (classes,), f"[C] = [{classes}]")

    everything: dict[str, Any] = {**z, **w, **b}
    autocast = torch.is_autocast_enabled(first.device.type) and all(x.dtype != torch.float64 for x in everything.values())
    for label, x in everything.items():
        check_not_dtensor(label, x)
        if x.device != first.device:
            raise ValueError(f"{label}: got device {x.device}, expected that of the first modality's features, {first.device}")
        if not x.is_floating_point():
            raise TypeError(f"{label}: got dtype {x.dtype}, expected floating point")
        if x.dtype != first.dtype and not autocast:
            raise TypeError(
                f"{label}: got dtype {x.dtype}, expected that of the first modality's features, {first.dtype}, or torch.autocast"
            )
    return z, w, b  # type: ignore[return-value]


def chunk_rows(rows: int, classes: int, modalities: int, dtype: torch.dtype, device: str, chunk: int | None = None) -> int:
    """Rows of logits that are held at once: ``chunk``, or as many as the budget allows, in chunks of about equal size."""
    if chunk is not None:
        if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
            raise ValueError(f"chunk: got {chunk!r}, expected a number of rows >= 1, or None for a memory budget")
        return chunk
    size = dtype.itemsize + max(dtype.itemsize, 4 if dtype == torch.float16 else 0)  # a logit and its gradient
    most = max(1, BUDGET.get(device, DEFAULT_BUDGET) // ((modalities + 1) * classes * size))
    if rows <= most:
        return most
    even = -(-rows // -(-rows // most))
    return min(most, -(-even // 16) * 16)


def linear_arl_loss(
    features: Tensors,
    weights: Tensor | Tensors,
    bias: Tensor | Tensors | None,
    target: Tensor,
    *,
    fusion: str = "concat",
    bias_mode: str = "full",
    chunk: int | None = None,
    return_logits: bool = False,
    gamma: float | Tensor = 1.0,
    temperature: float | Tensor = 8.0,
    rule: str | Callable[[BranchStats], Tensor] = "share",
    dependence: str = "confidence",
    entropy_floor: float | None = None,
    gain: str = "residual",
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    sync_stats: bool | Any = False,
    mask: Tensor | None = None,
    warming: bool | Tensor = False,
) -> Any:
    """A linear head and ``arl_loss`` in one, without the logits: at most a chunk of them is in memory at any time.

    Equal to ``arl_loss(*ConcatHead(...)(features), target)`` (SumHead for fusion "sum", SharedHead for "shared").
    No ``modulate`` and no link: the features' gradients come out multiplied by their gains, those of the weights and
    biases do not. Autocast is followed as by ``torch.nn.functional.linear``.

    Args:
        features: [B, D_m] or, for dense predictions, [B, d1, ..., D_m] per modality; a dict by name or a sequence.
        weights: "concat": one matrix [C, sum D_m], or [C, D_m] per modality; "sum": [C, D_m] per modality;
            "shared": one [C, D]. Per modality means a sequence, or a dict with the features' keys.
        bias: [C], for fusion "sum" one per modality; None for none.
        target: class indices [B, d1, ...] (int64, int32) or class probabilities [B, C, d1, ...], as for ``arl_loss``.
        fusion: "concat" x_f = sum_m W_m z_m + b, or "sum", "shared": x_f = sum_m x_m with x_m = W_m z_m + b_m.
        bias_mode: for fusion "concat": "full", x_m = W_m z_m + b, or "split", x_m = W_m z_m + b / M.
        chunk: rows of logits that are held at once; None: as many as fit a memory budget.
        return_logits: also return all logits, detached; this takes the memory that chunks would save.
        gamma, temperature, rule, dependence, entropy_floor, gain, weight, ignore_index, label_smoothing, reduction,
            sync_stats, mask, warming: as for ``arl_loss``.

    Returns:
        loss: 0-d, or [B, d1, ...] for reduction "none"; float32 (float64 for float64 features).
        stats: BranchStats over all rows, whatever the chunks.
        logits: BranchLogits [B, C, d1, ...], detached and without a link; only with ``return_logits``.

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype, shape, device or range.
        IndexError: a class index out of range, on a CPU.

    Backward can be run once, or several times with ``retain_graph``; it has no second derivative. reduction "none",
    float16 and ``sync_stats`` compute the logits twice where they need several chunks.
    """
    options = make_options(rule, dependence, entropy_floor, gain, ignore_index, label_smoothing, reduction)
    loss, packed, logits = packed_linear_loss(
        features,
        weights,
        bias,
        target,
        mask,
        weight,
        gamma,
        temperature,
        warming,
        options,
        sync_stats,
        fusion,
        bias_mode,
        chunk,
        return_logits,
    )
    return (loss, unpack(packed), logits) if return_logits else (loss, unpack(packed))


def packed_linear_loss(
    features: Tensors,
    weights: Tensor | Tensors,
    bias: Tensor | Tensors | None,
    target: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    gamma: float | Tensor,
    temperature: float | Tensor,
    warming: bool | Tensor,
    options: Options,
    sync_stats: bool | Any,
    fusion: str,
    bias_mode: str,
    chunk: int | None,
    return_logits: bool = False,
) -> tuple[Tensor, Tensor, BranchLogits | None]:
    """What linear_arl_loss, LinearARLLoss and the heads share: check, flatten, apply."""
    if sync_stats is False and not return_logits and (native := dispatch.native_steps()) is not None:
        # None where anything is unusual or wrong, or takes several chunks
        result = native.fast_linear_loss(
            options, fusion, bias_mode, chunk, BUDGET["cpu"], features, weights, bias, target, mask, weight, gamma, temperature, warming
        )
        if result is not None:
            return *result, None
    refuse_transforms("linear_arl_loss")
    _choice("fusion", fusion, FUSIONS)
    _choice("bias_mode", bias_mode, BIAS_MODES)
    z, w, b = _check(features, weights, bias, fusion)
    first = next(iter(z.values()))
    classes = next(iter(w.values())).shape[0]
    batch, *positions = first.shape[:-1]
    dtype = _product_dtype(first)
    count = first.shape[:-1].numel()
    rows_at_once = chunk_rows(count, classes, len(z), dtype, first.device.type, chunk)
    layout = _Layout(fusion, bias_mode, len(z), len(w), dtype, rows_at_once, return_logits)
    shape = (batch, classes, *positions)
    like = torch.empty((), dtype=dtype, device=first.device).expand(shape)  # what the checks want to know of the logits
    weight, schedule, group = prepare(like, len(z), target, mask, weight, gamma, temperature, warming, options, sync_stats)
    rows = [x.reshape(-1, x.shape[-1]) for x in z.values()]
    target = _to_rows(target) if target.is_floating_point() else target.reshape(-1)
    mask = _mask_rows(mask, like)
    loss, packed, *logits = _LinearARL.apply(
        torch.is_grad_enabled(),  # needs_input_grad would not tell: the parameters need gradients in evaluation too
        dispatch.for_loss(like, options, gamma),
        layout,
        options,
        schedule,
        group,
        target,
        mask,
        weight,
        *rows,
        *w.values(),
        *b.values(),
    )
    if options.reduction == "none":
        loss = loss.view(batch, *positions)
    if not return_logits:
        return loss, packed, None
    fused, *unimodal = [_from_rows(x, torch.Size(shape)) for x in logits]
    return loss, packed, BranchLogits(fused, dict(zip(features, unimodal, strict=True)) if isinstance(features, Mapping) else unimodal)


class LinearARLLoss(ARLLoss):
    """``linear_arl_loss`` as a module: ``loss = criterion(features, weights, bias, target)``.

    The matrices stay where they are, in the user's head; the module holds options, class weights and the warm-up
    counter. ConcatHead, SumHead and SharedHead call the same code with their own parameters: ``head.loss``.

    Args:
        fusion, bias_mode, chunk: as for ``linear_arl_loss``.
        options: those of ARLLoss, also for the presets: ``LinearARLLoss.paper("crema-d", fusion="sum")``.

    Shape:
        features, weights, bias, target, mask: as for ``linear_arl_loss``.
    """

    def __init__(self, fusion: str = "concat", bias_mode: str = "full", chunk: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        _choice("fusion", fusion, FUSIONS)
        _choice("bias_mode", bias_mode, BIAS_MODES)
        chunk_rows(1, 1, 1, torch.float32, "cpu", chunk)
        self.fusion = fusion
        self.bias_mode = bias_mode
        self.chunk = chunk

    def forward(  # type: ignore[override]
        self, features: Tensors, weights: Tensor | Tensors, bias: Tensor | Tensors | None, target: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        return apply_criterion(self, features, weights, bias, target, mask, self.fusion, self.bias_mode, self.chunk)[0]

    def extra_repr(self) -> str:
        return f"fusion={self.fusion!r}, bias_mode={self.bias_mode!r}, chunk={self.chunk}, {super().extra_repr()}"


def apply_criterion(
    criterion: ARLLoss,
    features: Tensors,
    weights: Tensor | Tensors,
    bias: Tensor | Tensors | None,
    target: Tensor,
    mask: Tensor | None,
    fusion: str,
    bias_mode: str,
    chunk: int | None,
) -> tuple[Tensor, BranchStats]:
    """Loss and statistics with the options, the class weights and the warm-up of an ARLLoss, whose ``stats`` they become."""
    loss, packed, _ = packed_linear_loss(
        features,
        weights,
        bias,
        target,
        mask,
        criterion.weight,
        criterion.gamma,
        criterion.temperature,
        criterion._warming(target),
        criterion.options,
        criterion.sync_stats,
        fusion,
        bias_mode,
        chunk,
    )
    criterion._remember(packed, features)
    return loss, unpack(packed)
