"""Which guard for fusion weights? What each keeps where a view is noisy, and costs where all are alike.

    python examples/fusion_guard.py [--seeds 6] [--rows FILE]

Models with unimodal losses on scikit-learn's digits, cut into views; from the rows that are not trained on,
random ones for the fit, the others for the test. Every figure is the change of test accuracy against the
plain sum, in points.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence

import torch
from shared import Net, arguments, mlp
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import arl_fast
from arl_fast.ladder import Batches, Budget, Data, climb

PER_CLASS, WIDTH, DRAWS, BATCH = 12, 64, 4, 24
BUDGET = Budget(epochs=50, rates=(0.05,))
HALVES = ((slice(None), slice(4)), (slice(None), slice(4, None)))
QUADRANTS = tuple((slice(a, a + 4), slice(b, b + 4)) for a in (0, 4) for b in (0, 4))
STRIPS = ((slice(2), slice(None)), (slice(2, None), slice(None)))
SETTINGS = {  # views of the image [8, 8], noise of each in standard deviations of a pixel
    "halves": (HALVES, (0, 0)),
    "quadrants": (QUADRANTS, (0, 0, 0, 0)),
    "top quarter, rest": (STRIPS, (0, 0)),
    "halves, noise 1": (HALVES, (0, 1.0)),
    "halves, noise 1.2": (HALVES, (0, 1.2)),
    "quadrants, rising noise": (QUADRANTS, (0, 0.5, 1.0, 2.0)),
}
TINY = 1e-6  # a guard that changes nothing and tells by report.kept what any other would do


def split(setting: str, seed: int, held_out: int = 0) -> Data:
    """PER_CLASS training rows of each class; of the rest ``held_out`` rows for validation, others to test."""
    cuts, noise = SETTINGS[setting]
    digits = load_digits()
    images, y = torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=generator)
    chosen = torch.cat([order[y[order] == c][:PER_CLASS] for c in range(10)])
    rest = order[~torch.isin(order, chosen)]
    x = {}
    for m, ((rows, columns), sigma) in enumerate(zip(cuts, noise, strict=True)):
        view = images[:, rows, columns].flatten(1)
        x[str(m)] = view + sigma * images.std() * torch.randn(view.shape, generator=generator)

    def batches(index: Tensor, size: int | None = None) -> Batches:
        return Batches({m: view[index] for m, view in x.items()}, y[index], size)

    validation = batches(rest[:held_out]) if held_out else None
    return Data(batches(chosen, BATCH), validation, batches(rest[held_out:]))


def net(setting: str) -> Net:
    """One small MLP per view."""
    pixels = [len(range(8)[rows]) * len(range(8)[columns]) for rows, columns in SETTINGS[setting][0]]
    return Net({str(m): mlp(n, WIDTH) for m, n in enumerate(pixels)}, WIDTH, 10)


def model(setting: str, seed: int) -> tuple[nn.Module, arl_fast.BranchLogits, Tensor]:
    """A trained model's head, and its logits of the rows that it was not trained on."""
    data, made = split(setting, seed), []

    def factory() -> Net:
        made.append(net(setting))
        return made[-1]

    climb(factory, lambda _: data, BUDGET, [seed], ["constant"], progress=False)
    with torch.no_grad():
        return made[-1].head, made[-1](data.test.x), data.test.y


def judge(
    head: nn.Module, out: arl_fast.BranchLogits, y: Tensor, fit: Tensor, test: Tensor
) -> dict[str, float]:
    """Guard -> change of test accuracy."""

    def rows(index: Tensor) -> arl_fast.BranchLogits:
        return arl_fast.BranchLogits(out.fused[index], {m: x[index] for m, x in out.unimodal.items()})

    def gain(weights: list[float]) -> float:
        fusion.weights = torch.tensor(weights)
        return 100 * float((fusion(tested).argmax(1) == y[test]).float().mean()) - plain

    tested = rows(test)
    plain = 100 * float((tested.fused.argmax(1) == y[test]).float().mean())
    fusion = arl_fast.FusionWeights.fit(head, rows(fit), y[fit], guard=TINY)
    report = fusion.report
    noise = (1 - report.kept) / TINY  # N / S of the docstring
    log_w = torch.tensor(report.fitted).log()
    result = {"none": gain(report.fitted)}
    for guard in (1.0, 1.25, 1.5, 2.0):
        shrunk = log_w.mean() + max(0.0, 1 - guard * noise) * (log_w - log_w.mean())
        result[f"shrink {guard:g}"] = gain(shrunk.exp().tolist())
    certain = report.accuracy_gain.mean > 2 * report.accuracy_gain.error
    result["gate at 2 standard errors"] = result["none"] if certain else 0.0
    result["gate at r < 0.75"] = result["none"] if report.ratio < 0.75 else 0.0
    return result


def main(arguments_given: Sequence[str] | None = None) -> None:
    options = arguments(__doc__, seeds=6).parse_args(arguments_given)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for setting in SETTINGS:
        found: dict[int, list[dict[str, float]]] = {50: [], 200: []}
        for seed in tqdm(range(options.seeds), desc=setting, unit="model"):
            head, out, y = model(setting, seed)
            for n, results in found.items():
                for draw in range(DRAWS):
                    order = torch.randperm(
                        len(y), generator=torch.Generator().manual_seed(1000 * seed + draw)
                    )
                    results.append(judge(head, out, y, order[:n], order[200:]))
        for n, results in found.items():
            print(f"{setting}, {n} rows")
            for guard in results[0]:
                by_seed = torch.tensor([r[guard] for r in results]).view(options.seeds, DRAWS).mean(1)
                mean, error = float(by_seed.mean()), float(by_seed.std() / options.seeds**0.5)
                print(f"  {guard:<28}{mean:+.2f} ± {error:.2f}")
                row = {"example": "fusion_guard", "setting": setting, "rows": n, "guard": guard}
                row |= {"gain": round(mean, 3), "error": round(error, 3)}
                row |= {"seeds": options.seeds, "draws": DRAWS}
                if options.rows:
                    with options.rows.open("a") as file:
                        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
