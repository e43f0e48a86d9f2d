"""The loop of timm's train.py, which calls ``loss_fn(output, target)``: mixup, autocast, a loss scaler.

python examples/timm_style.py. The parts of timm's script that touch the loss, on two modalities; timm itself
is not needed.
"""

from __future__ import annotations

import contextlib

import torch
from synthetic import CLASSES, TwoModalities, pairs
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

import arl_fast


def mixup(inputs: list[Tensor], target: Tensor, alpha: float = 0.2) -> tuple[list[Tensor], Tensor]:
    """Both modalities and the one-hot targets, mixed with the batch in reverse by one share."""
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    soft = F.one_hot(target, CLASSES).float()
    return [share * x + (1 - share) * x.flip(0) for x in inputs], share * soft + (1 - share) * soft.flip(0)


def train_one_epoch(model, loader, optimizer, loss_fn, amp_autocast=contextlib.suppress, scaler=None) -> None:
    model.train()
    loss_fn.train()
    for *inputs, target in loader:
        inputs, target = mixup(inputs, target)
        with amp_autocast():
            output = model(*inputs)
            loss = loss_fn(output, target)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


def validate(model, loader, loss_fn, amp_autocast=contextlib.suppress) -> float:
    model.eval()
    loss_fn.eval()
    correct = rows = 0
    with torch.no_grad():
        for *inputs, target in loader:
            with amp_autocast():
                output = model(*inputs)
                loss_fn(output, target)
            # as timm does; BranchLogits are a tuple with the fused logits first
            if isinstance(output, (tuple, list)):
                output = output[0]
            correct += int((output.argmax(1) == target).sum())
            rows += len(target)
    return correct / rows


def main(epochs: int = 3, rows: int = 512) -> float:
    """Train, and return the accuracy on held-out rows."""
    torch.manual_seed(0)
    model = TwoModalities()
    train_loss_fn = arl_fast.ARLLoss(label_smoothing=0.1)
    validate_loss_fn = arl_fast.ARLLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu")

    def amp_autocast():
        return torch.autocast("cpu", torch.bfloat16)

    for epoch in range(epochs):
        train_one_epoch(
            model,
            DataLoader(pairs(rows), batch_size=32, shuffle=True),
            optimizer,
            train_loss_fn,
            amp_autocast,
            scaler,
        )
        accuracy = validate(
            model, DataLoader(pairs(256, seed=2), batch_size=128), validate_loss_fn, amp_autocast
        )
        print(f"epoch {epoch}: accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
