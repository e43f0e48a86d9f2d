"""transformers.Trainer with compute_loss_func and AdamW: python examples/hf_trainer.py

AdamW, the Trainer's default, cancels gains on the gradient (docs/loops.md), so they act on the update here:
``UpdateGains`` on an optimizer with a parameter group per encoder, and ``detach_link`` in the model.
"""

from __future__ import annotations

import tempfile

import torch
from synthetic import TwoModalities, pairs
from transformers import Trainer, TrainingArguments

import arl_fast
from arl_fast.integrations.huggingface import compute_loss_func
from arl_fast.optim import UpdateGains, detach_link


class Model(TwoModalities):
    """Returns a dict, as the Trainer likes it, and carries the criterion along, so that it is saved and moved
    with the model.
    """

    def __init__(self) -> None:
        super().__init__()
        self.criterion = arl_fast.ARLLoss(reduction="sum", warmup=4)

    def forward(self, audio, visual):
        out = detach_link(super().forward(audio, visual))  # gains are computed, and no gradient is scaled
        return {"fused": out.fused, **out.unimodal, "link": out.link}


def main(steps: int = 24, rows: int = 256, make=torch.optim.AdamW, **arguments):
    """Train and evaluate; ``arguments`` go to TrainingArguments. Returns the Trainer and the metrics."""
    items = [{"audio": a, "visual": v, "labels": y} for a, v, y in pairs(rows)]
    held_out = [{"audio": a, "visual": v, "labels": y} for a, v, y in pairs(128, seed=2)]
    with tempfile.TemporaryDirectory() as folder:
        options = dict(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=32,
            gradient_accumulation_steps=2,
            seed=0,
        )
        options |= dict(
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        options |= dict(use_cpu=not torch.cuda.is_available(), label_names=["labels"], logging_steps=8)
        model = Model()
        groups = [{"params": part.parameters()} for part in (model.audio, model.visual, model.head)]
        optimizer = make(groups, lr=1e-2)
        UpdateGains(optimizer, {"audio": 0, "visual": 1}, model.criterion)
        trainer = Trainer(
            model,
            TrainingArguments(**{**options, **arguments}),
            train_dataset=items,
            eval_dataset=held_out,
            optimizers=(optimizer, None),  # the Trainer adds its learning-rate schedule
            compute_loss_func=compute_loss_func(model.criterion),
            compute_metrics=lambda p: {"accuracy": float((p.predictions[0].argmax(1) == p.label_ids).mean())},
        )
        trainer.train()
        return trainer, trainer.evaluate()


if __name__ == "__main__":
    print(main()[1])
