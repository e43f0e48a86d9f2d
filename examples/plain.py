"""A plain training loop: python examples/plain.py [--epochs 3] [--precision bf16|fp16] [--accumulate 2]
[--compile]
"""

from __future__ import annotations

import argparse

import torch
from synthetic import TwoModalities, pairs
from torch.utils.data import DataLoader

import arl_fast


def main(
    epochs: int = 3, rows: int = 512, precision: str = "fp32", accumulate: int = 1, compile: bool = False
) -> float:
    """Train, and return the accuracy of the fused prediction on held-out rows."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loader = DataLoader(pairs(rows), batch_size=32, shuffle=True)
    model = TwoModalities().to(device)
    criterion = arl_fast.ARLLoss(warmup=len(loader)).to(device)  # one epoch with gains 1
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler(device, enabled=precision == "fp16")
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]

    def forward(audio, visual, target):
        return criterion(model(audio, visual), target)

    step = torch.compile(forward, fullgraph=True) if compile else forward
    for epoch in range(epochs):
        model.train()
        criterion.train()
        for i, batch in enumerate(loader):
            audio, visual, target = (x.to(device) for x in batch)
            with torch.autocast(device, dtype, enabled=dtype is not None):
                loss = step(audio, visual, target)
            scaler.scale(loss / accumulate).backward()
            if (i + 1) % accumulate == 0:
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()

        model.eval()
        criterion.eval()  # a call in evaluation does not count for the warm-up
        with torch.no_grad():
            audio, visual, target = (x.to(device) for x in pairs(512, seed=2).tensors)
            loss = criterion(model(audio, visual), target)
        stats = criterion.stats
        print(
            f"epoch {epoch}: loss {loss:.3f}, accuracy fused {stats.accuracy[0]:.3f}, "
            f"audio {stats.accuracy[1]:.3f}, "
            f"visual {stats.accuracy[2]:.3f}, gains {[round(g, 2) for g in stats.gains.tolist()]}"
        )
    return float(stats.accuracy[0])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    main(**vars(parser.parse_args()))
