"""transformers.Trainer with compute_loss_func: python examples/hf_trainer.py"""

from __future__ import annotations

import tempfile

import torch
from synthetic import TwoModalities, pairs
from transformers import Trainer, TrainingArguments

import arl_fast
from arl_fast.integrations.huggingface import compute_loss_func


class Model(TwoModalities):
    """Returns a dict, as the Trainer likes it, and carries the criterion along, so that it is saved and moved with the model."""

    def __init__(self) -> None:
        super().__init__()
        self.criterion = arl_fast.ARLLoss(reduction="sum", warmup=4)

    def forward(self, audio, visual):
        out = super().forward(audio, visual)
        return {"fused": out.fused, **out.unimodal, "link": out.link}


def main(steps: int = 24, rows: int = 256, **arguments):
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
            learning_rate=1e-2,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        options |= dict(use_cpu=not torch.cuda.is_available(), label_names=["labels"], logging_steps=8)
        model = Model()
        trainer = Trainer(
            model,
            TrainingArguments(**{**options, **arguments}),
            train_dataset=items,
            eval_dataset=held_out,
            compute_loss_func=compute_loss_func(model.criterion),
            compute_metrics=lambda p: {"accuracy": float((p.predictions[0].argmax(1) == p.label_ids).mean())},
        )
        trainer.train()
        return trainer, trainer.evaluate()


if __name__ == "__main__":
    print(main()[1])
