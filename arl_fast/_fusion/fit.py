"""The fit of fusion weights: Newton's method in as many numbers as weights, from sums over the rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .rows import FOLDS, Chunk, Rows

RIDGE_LOG = 0.01  # method "branch": RIDGE_LOG * (log w)^2 is added to a branch's mean cross-entropy
RIDGE = 0.001  # method "joint": RIDGE * |w - plain|^2 is added to the mean cross-entropy of the whole
_REACH = 8  # |log w| up to which a grid looks for a temperature
_NEWTON = 8  # passes at most, each for "branch" and "joint"; 19 with the grid, the errors and the report


class _View(NamedTuple):
    """A model of the target: softmax(offset + sum_k w_k designs_k), on the rows where ``present`` is 1."""

    offset: Tensor
    designs: Tensor
    present: Tensor


def _each_branch(chunk: Chunk) -> list[_View]:
    zero = torch.zeros_like(chunk.base)
    return [_View(zero, x[None], p) for x, p in zip(chunk.branches, chunk.present, strict=True)]


def _whole(chunk: Chunk) -> list[_View]:
    return [_View(chunk.base, chunk.designs, torch.ones_like(chunk.size))]


class _Sums(NamedTuple):
    """Of V views at Q points, over the rows that a point uses: mean cross-entropy, its derivatives in w."""

    loss: Tensor  # [V, Q]
    gradient: Tensor  # [V, Q, K]
    hessian: Tensor  # [V, Q, K, K]
    scatter: Tensor  # [Q, V K, V K] covariance of the gradients' sampling error, from the samples


def _sums(rows: Iterable[Chunk], views: Callable[[Chunk], list[_View]], points: Tensor, use: Tensor) -> _Sums:
    """One pass over the rows.

    Args:
        points: [V, Q, K] weights.
        use: [Q, FOLDS], 1 where a point uses the rows of a fold.
    """
    many, number, inputs = points.shape
    use = use.double()
    size = torch.zeros(many, number, dtype=torch.float64)
    loss, gradient = torch.zeros_like(size), torch.zeros(many, number, inputs, dtype=torch.float64)
    hessian = torch.zeros(many, number, inputs, inputs, dtype=torch.float64)
    scatter = torch.zeros(number, many * inputs, many * inputs, dtype=torch.float64)
    samples = torch.zeros(number, dtype=torch.float64)
    for chunk in rows:
        device = chunk.size.device
        used = use.to(device)[:, chunk.fold]  # [Q, n]
        here = chunk.by_sample(chunk.valid) > 0
        samples += (here * used[:, :: chunk.positions]).sum(1).cpu()
        per_sample = [[] for _ in range(number)]  # type: ignore[var-annotated]
        for v, view in enumerate(views(chunk)):
            q = chunk.target * view.present[:, None]
            mass, expected = q.sum(1), torch.einsum("knc,nc->kn", view.designs, q)
            size[v] += (used @ (chunk.size * view.present)).cpu()
            for j in range(number):
                log_p = (
                    view.offset + torch.einsum("k,knc->nc", points[v, j].to(device), view.designs)
                ).log_softmax(1)
                p = log_p.exp()
                mean = torch.einsum("knc,nc->kn", view.designs, p)
                rows_gradient = (mass * mean - expected) * used[j]
                weighted = used[j] * mass
                second = torch.einsum("knc,lnc->kl", view.designs * (p * weighted[:, None]), view.designs)
                loss[v, j] -= ((q * log_p).sum(1) @ used[j]).cpu()
                gradient[v, j] += rows_gradient.sum(1).cpu()
                hessian[v, j] += (second - (mean * weighted) @ mean.T).cpu()
                per_sample[j].append(chunk.by_sample(rows_gradient))
        for j, parts in enumerate(per_sample):
            each = torch.cat(parts)  # [V K, samples]
            scatter[j] += (each @ each.T).cpu()
    scale = size.clamp_min(torch.finfo(torch.float64).tiny)
    total = gradient.transpose(0, 1).flatten(1)  # [Q, V K]
    norm = scale.T.repeat_interleave(inputs, 1)
    scatter = scatter - total[:, :, None] * total[:, None, :] / samples.clamp_min(1)[:, None, None]
    scatter = (
        scatter
        / (norm[:, :, None] * norm[:, None, :])
        * (samples / (samples - 1).clamp_min(1))[:, None, None]
    )
    return _Sums(loss / scale, gradient / scale[..., None], hessian / scale[..., None, None], scatter)


def _temperatures(rows: Rows, views: int, use: Tensor) -> Tensor:
    """log w [V, Q] of every branch alone, for Q selections of rows: CE(w x_m) + RIDGE_LOG (log w)^2.

    In log w this can have several minima: Newton's method starts from the best point of a grid, and where it
    leaves the bracket of the signs seen so far, bisection takes its place.
    """
    grid = torch.arange(-_REACH, _REACH + 1, 2, dtype=torch.float64)
    everywhere = torch.ones(len(grid), FOLDS, dtype=torch.bool)
    coarse = (
        _sums(rows, _each_branch, grid.exp().expand(views, -1)[..., None], everywhere).loss
        + RIDGE_LOG * grid.square()
    )
    t = grid[coarse.argmin(1)][:, None].repeat(1, len(use))
    low, high = torch.full_like(t, -_REACH - 2), torch.full_like(t, _REACH + 2)
    for _ in range(_NEWTON):
        w = t.exp()
        sums = _sums(rows, _each_branch, w[..., None], use)
        slope = w * sums.gradient[..., 0] + 2 * RIDGE_LOG * t
        curvature = w * sums.gradient[..., 0] + w.square() * sums.hessian[..., 0, 0] + 2 * RIDGE_LOG
        low, high = torch.where(slope < 0, t, low), torch.where(slope > 0, t, high)
        newton = t + torch.where(curvature > 0, -slope / curvature, -2 * slope.sign()).clamp(-2, 2)
        new = torch.where((newton >= low) & (newton <= high), newton, (low + high) / 2)
        moved, t = float((new - t).abs().max()), new
        if moved < 1e-9:
            break
    return t


def _jointly(rows: Rows, plain: Tensor, start: Tensor, use: Tensor) -> Tensor:
    """w [Q, K] >= 0 of the whole, for Q selections: CE(base + sum_k w_k designs_k) + RIDGE |w - plain|^2.

    Convex. Each step goes to the minimum of the quadratic model over w >= 0, and a quarter of the way where
    the function would not fall.
    """
    number, inputs = start.shape
    best, trial = start.clone(), start.clone()
    value = torch.full((number,), math.inf, dtype=torch.float64)
    moving = [True] * number
    for _ in range(_NEWTON):
        sums = _sums(rows, _whole, trial[None], use)
        loss = sums.loss[0] + RIDGE * (trial - plain).square().sum(1)
        gradient = sums.gradient[0] + 2 * RIDGE * (trial - plain)
        hessian = sums.hessian[0] + 2 * RIDGE * torch.eye(inputs, dtype=torch.float64)
        for j in range(number):
            if not moving[j]:
                continue
            if loss[j] <= value[j] + 1e-12 or not math.isfinite(value[j]):
                best[j], value[j] = trial[j], loss[j]
                trial[j] = _quadratic_minimum(hessian[j], hessian[j] @ trial[j] - gradient[j])
            else:
                trial[j] = best[j] + (trial[j] - best[j]) / 4
            moving[j] = bool((trial[j] - best[j]).abs().max() > 1e-9)
        if not any(moving):
            break
    return best


def _quadratic_minimum(h: Tensor, c: Tensor) -> Tensor:
    """argmin over v >= 0 of v' h v / 2 - c' v, h positive definite: Lawson and Hanson's active sets."""
    v, free = torch.zeros_like(c), torch.zeros_like(c, dtype=torch.bool)
    for _ in range(3 * len(c)):
        pull = torch.where(free, -math.inf, c - h @ v)
        if float(pull.max()) <= 1e-12 * (1 + float(c.abs().max())):
            break
        free[pull.argmax()] = True
        while True:
            inside = torch.zeros_like(v)
            inside[free] = torch.linalg.solve(h[free][:, free], c[free])
            if not bool((inside[free] <= 0).any()):
                v = inside
                break
            blocked = free & (inside <= 0)
            v = v + (v / (v - inside).clamp_min(1e-300))[blocked].min() * (inside - v)
            free &= ~(blocked & (v <= 1e-15))
            v = torch.where(free, v, 0.0)
    return v


class Fit(NamedTuple):
    """For every selection of rows, the last being all: weights before and after the guard, their errors."""

    fitted: Tensor  # [Q, K]
    errors: Tensor  # [Q, K]
    weights: Tensor  # [Q, K]
    kept: Tensor  # [Q]
    temperatures: Tensor  # [V, Q], w of each branch alone


def fit_weights(rows: Rows, method: str, plain: Tensor, guard: float, pool: bool) -> Fit:
    number = len(plain)
    identity = torch.eye(number, dtype=torch.float64)
    use = torch.cat([~torch.eye(FOLDS, dtype=torch.bool), torch.ones(1, FOLDS, dtype=torch.bool)])
    log_w = _temperatures(rows, number, use)
    w = log_w.exp()
    if method == "branch":
        sums = _sums(rows, _each_branch, w[..., None], use)
        scale = (w * sums.gradient[..., 0] + w.square() * sums.hessian[..., 0, 0] + 2 * RIDGE_LOG).T  # [Q, M]
        inverse = torch.diag_embed(w.T / scale.clamp_min(1e-300))
        theta, common, metric = log_w.T, torch.ones_like(plain), identity.expand(len(use), -1, -1)
    else:
        theta = _jointly(rows, plain, (w / number if pool else w).T, use)
        sums = _sums(rows, _whole, theta[None], use)
        metric = sums.hessian[0] + 2 * RIDGE * identity
        inside = (theta > 0).double()
        both = inside[:, :, None] * inside[:, None, :]
        inverse = torch.linalg.inv(metric * both + torch.diag_embed(1 - inside)) * both
        common = plain
    covariance = inverse @ sums.scatter @ inverse.mT
    errors = covariance.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()

    # theta is a common part, which changes no decision, and a difference: how much of that is noise?
    pulled = metric @ common  # [Q, K]
    # the projection on differences
    away = identity - common[:, None] * pulled[:, None, :] / (pulled @ common)[:, None, None]
    difference = (away @ theta[:, :, None])[..., 0]
    spread = torch.einsum("qk,qkl,ql->q", difference, metric, difference)
    noise = (metric @ away @ covariance @ away.mT).diagonal(dim1=1, dim2=2).sum(1)
    if guard:
        kept = torch.where(spread > 1e-18, 1 - guard * noise / spread.clamp_min(1e-300), 0.0).clamp(0, 1)
    else:
        kept = torch.ones_like(spread)
    shrunk = theta - (1 - kept[:, None]) * difference
    fitted, weights = (theta.exp(), shrunk.exp()) if method == "branch" else (theta, shrunk.clamp_min(0))
    weights = torch.where(kept[:, None] > 0, weights, plain)
    return Fit(fitted, errors, weights, kept, w)
