"""Linear heads: time and peak memory of features -> gradients, ``linear_arl_loss`` and its rivals.

    python -m benchmarks.linear --device cpu --rows rows.jsonl      measure, one row per shape and contender

A step starts at two modalities' features [B, 512] and ends at the gradients of features, weight and bias,
upstream 1. Contenders take turns in rotated order, each checked against float64 truth before it is timed. On
a CPU one thread runs and the time is the process's CPU time, which other load on the machine hardly changes.
`python -m benchmarks.plot` writes the tables of docs/performance.md.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __package__ in (None, ""):  # called by its path
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

import arl_fast  # noqa: E402
from arl_fast.implementations import dispatch  # noqa: E402

from . import contenders, machine, rows, tables, truth  # noqa: E402
from .cases import GAMMA, TEMPERATURE  # noqa: E402

SIZE = 512
SHAPES = [(batch, classes) for classes in (6, 309, 1000, 32000) for batch in (64, 1024, 4096)]
LARGE = 1 << 24  # logits of a branch from which a shape takes minutes on a CPU: only measured when asked for
OURS, HEAD, RELEASE = "linear_arl_loss", "head + arl_loss", "zero-padded head + eager ARL"
TORCH, CHUNKED = "torch linear_cross_entropy", "torch linear_cross_entropy, chunked"
LIMIT = 2e-4  # relative error of a gradient in float32 over products of up to 32000 terms

Step = Callable[[list[Tensor], Tensor, Tensor, Tensor], Tensor]  # features, weight, bias, target -> loss


def ours(z: list[Tensor], weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    return arl_fast.linear_arl_loss(z, weight, bias, target, gamma=GAMMA, temperature=TEMPERATURE)[0]


def head(z: list[Tensor], weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    """ConcatHead and arl_loss."""
    out = _module(weight, bias)(z)
    return arl_fast.arl_loss(out.fused, out.unimodal, target, out.link, gamma=GAMMA, temperature=TEMPERATURE)[
        0
    ]


@functools.lru_cache(maxsize=1)
def _module(weight: Tensor, bias: Tensor) -> arl_fast.ConcatHead:
    with torch.device("meta"):
        module = arl_fast.ConcatHead([SIZE, SIZE], len(bias))
    module.linear.weight, module.linear.bias = weight, bias  # type: ignore[assignment]
    return module


def release(z: list[Tensor], weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    """The release's head: a product of the concatenated features per branch, others at zero. No gains."""
    zero = torch.zeros_like(z[0])
    logits = [F.linear(torch.cat(pair, 1), weight, bias) for pair in (z, [z[0], zero], [zero, z[1]])]
    eager = contenders.eager_stacked if 3 * logits[0].numel() <= 1 << 17 else contenders.eager_split
    return eager(logits, target, zero)[0]


def torchs(options: Any) -> Step:
    """One branch, no statistics."""

    def step(z: list[Tensor], weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
        return F.linear_cross_entropy(torch.cat(z, 1), weight, target, linear_bias=bias, options=options)

    return step


def all_steps() -> dict[str, Step]:
    found: dict[str, Step] = {OURS: ours, HEAD: head, RELEASE: release}
    if hasattr(F, "linear_cross_entropy"):
        found |= {TORCH: torchs(None), CHUNKED: torchs(torch.nn.LinearCrossEntropyOptions())}
    return found


def make(batch: int, classes: int, device: str) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Features that tell something about the target, more in the first modality than in the second."""
    generator = torch.Generator().manual_seed(batch + classes)
    weight = torch.randn(classes, 2 * SIZE, generator=generator) / SIZE**0.5
    bias = torch.randn(classes, generator=generator)
    target = torch.randint(0, classes, (batch,), generator=generator)
    own = weight[target].split(SIZE, 1)
    z = [torch.randn(batch, SIZE, generator=generator) + k * w for k, w in zip((3.0, 1.0), own, strict=True)]
    return (
        [x.to(device).requires_grad_() for x in z],
        torch.nn.Parameter(weight.to(device)),
        torch.nn.Parameter(bias.to(device)),
        target.to(device),
    )


def expected(
    z: list[Tensor], weight: Tensor, bias: Tensor, target: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """In float64, some rows at a time: gradients of z, weight and bias for the ARL loss without gains; the
    gains; and for CE alone.
    """
    leaves = [x.detach().double().requires_grad_() for x in (*z, weight, bias)]
    batch = len(target)
    sums = [[torch.zeros_like(x) for x in leaves] for _ in range(2)]
    entropy, dependence = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for start in range(0, batch, 512):
        y = target[start : start + 512]
        parts = [
            a[start : start + 512] @ w.t() for a, w in zip(leaves[:2], leaves[2].split(SIZE, 1), strict=True)
        ]
        logp = [torch.log_softmax(x + leaves[3], 1) for x in (parts[0] + parts[1], *parts)]
        losses = [F.nll_loss(x, y, reduction="sum") / batch for x in logp]
        for total, loss in zip(sums, (losses[0], losses[0] + GAMMA * (losses[1] + losses[2])), strict=True):
            for t, g in zip(total, torch.autograd.grad(loss, leaves, retain_graph=True), strict=True):
                t += g
        for m, x in enumerate(logp[1:]):
            p = x.detach().exp()
            entropy[m] -= float((p * x.detach()).sum()) / batch
            dependence[m] += float(p.gather(1, y[:, None]).sum()) / batch
    plain, arl = sums
    gains = 1 + truth.coefficients(entropy, dependence, None)
    return plain, [g * gains[m] if m < 2 else g for m, g in enumerate(arl)] + arl[:2]


def gate(name: str, grads: Sequence[Tensor], plain: Sequence[Tensor], arl: Sequence[Tensor]) -> float:
    """Largest relative error of a contender's gradients; raises truth.Rejected."""
    want = (
        list(plain)
        if name.startswith("torch")
        else [*arl[4:], *arl[2:4]]
        if name == RELEASE
        else list(arl[:4])
    )
    error = max(truth.relative(g, w) for g, w in zip(grads, want, strict=True))
    if not error <= LIMIT:
        raise truth.Rejected(f"{name}: relative error {error:.2g} > {LIMIT:.0e}")
    return error


def profiled(call: Callable[[], Any], device: str) -> tuple[int, Any]:
    """Peak memory beyond the inputs of one call, its results included, and these results."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, result
    arl_fast.release_memory()  # a block of another shape could serve, and be too large
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    held = peak = 0
    for event in sorted(
        (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"),
        key=lambda e: e.start_ns(),
    ):
        held += event.nbytes()
        peak = max(peak, held)
    return peak, result


def timed(call: Callable[[], Any], loops: int, device: str) -> float:
    """Seconds per call: the process's CPU time, on a GPU the time until the device has finished."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    if device == "cuda":
        torch.cuda.synchronize()
    begin = clock()
    for _ in range(loops):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (clock() - begin) / loops


def measure(
    batch: int, classes: int, device: str, seconds: float, wanted: Sequence[str] | None = None
) -> list[rows.Row]:
    """All contenders at one shape, taking turns; about ``seconds`` each, in two rounds at least."""
    z, weight, bias, target = make(batch, classes, device)
    leaves = [*z, weight, bias]
    plain, arl = expected(z, weight, bias, target)
    steps = {name: step for name, step in all_steps().items() if wanted is None or name in wanted}
    calls = {
        name: (lambda step=step: torch.autograd.grad(step(z, weight, bias, target), leaves))
        for name, step in steps.items()
    }
    found, loops = {}, {}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    small = batch * classes < 1 << 20
    rounds = 3 if batch * classes < 1 << 26 else 2
    for name, call in calls.items():
        if small:
            call()  # what is only made once does not count
        peak, grads = profiled(call, device)
        error = gate(name, grads, plain, arl)
        del grads
        once = timed(call, 1, device)
        loops[name] = max(1, round(min(0.05, seconds / 20) / max(once, 1e-6)))
        found[name] = dict(
            **machine.describe(device),
            experiment="linear",
            suite="linear",
            batch=batch,
            classes=classes,
            modalities=2,
            features=SIZE,
            dtype="float32",
            threads=torch.get_num_threads() if device == "cpu" else None,
            implementation=dispatch.choose(device, dispatch.override)[0],
            contender=name,
            what="both",
            cache="warm",
            errors={"gradients": error},
            peak_bytes=peak,
            peak_ratio=round(peak / (3 * 4 * batch * classes), 3),
        )
    order, begin = list(calls), time.perf_counter()
    while min(map(len, samples.values())) < rounds or (
        time.perf_counter() - begin < seconds * len(calls) and len(samples[OURS]) < 60
    ):
        for name in order:
            if not small:
                calls[name]()  # finds its memory as its own last step left it, not another contender's
            samples[name].append(timed(calls[name], loops[name], device))
        order = order[1:] + order[:1]
    base = samples[OURS]
    for name, row in found.items():
        row["device_us" if device == "cuda" else "host_us"] = rows.summary(samples[name])
        # the ratio of neighbours in time, round by round: what else the machine does changes both
        row["ratio"] = round(statistics.median(a / b for a, b in zip(samples[name], base, strict=True)), 4)
    return list(found.values())


def table(found: list[rows.Row], kind: str) -> str:
    """Time relative to head + arl_loss on a CPU, in microseconds on a GPU; peak memory beyond the inputs in
    MiB.
    """
    chosen = tables.select(found, experiment="linear", kind=kind)
    order = [OURS, HEAD, RELEASE, TORCH, CHUNKED]
    names = [n for n in order if any(r["contender"] == n for r in chosen)]
    body = []
    for batch, classes in dict.fromkeys((r["batch"], r["classes"]) for r in chosen):
        at = {r["contender"]: r for r in tables.select(chosen, batch=batch, classes=classes)}
        unit = at[HEAD]["ratio"]
        time_cells = [
            tables.number(tables.median(at.get(n)), 1)
            if kind == "cuda"
            else tables.number(at[n]["ratio"] / unit)
            for n in names
        ]
        body.append(
            [f"{batch} x {classes}", *time_cells, *(f"{at[n]['peak_bytes'] / 2**20:.1f}" for n in names)]
        )
    what = "us" if kind == "cuda" else "time"
    return (
        tables.markdown(["B x C", *(f"{what}: {n}" for n in names), *(f"MiB: {n}" for n in names)], body)
        if body
        else "Not measured yet."
    )


def generated(found: list[rows.Row]) -> dict[str, str]:
    """Markers of docs/performance.md and what belongs between them."""
    return {"linear-cpu": table(found, "cpu"), "linear-gpu": table(found, "cuda")}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rows", help="file to append rows to")
    parser.add_argument("--shapes", help="as 64x6,1024x309 instead of all")
    parser.add_argument("--seconds", type=float, default=4.0, help="per contender and shape")
    parser.add_argument("--tiny", action="store_true", help="one small shape, to see that everything runs")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    shapes = [tuple(map(int, s.split("x"))) for s in options.shapes.split(",")] if options.shapes else SHAPES
    if not options.shapes and options.device == "cpu":
        shapes = [(batch, classes) for batch, classes in shapes if batch * classes < LARGE]
    for batch, classes in [(8, 6)] if options.tiny else shapes:
        found = measure(batch, classes, options.device, 0.1 if options.tiny else options.seconds)
        if options.rows:
            rows.append(options.rows, found)
        unit = next(r["ratio"] for r in found if r["contender"] == HEAD)
        cells = "; ".join(
            f"{r['contender']} {r['ratio'] / unit:.2f} ({r['peak_bytes'] / 2**20:.1f} MiB)" for r in found
        )
        print(f"{batch} x {classes}: {cells}", flush=True)


if __name__ == "__main__":
    main()
