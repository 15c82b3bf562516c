"""Transformers' Trainer: a callback that saves into the Trainer's checkpoints. torchrun's ranks."""

from __future__ import annotations

from pathlib import Path

import torch
from common import CONFIG, FOLDER, HALF, STEPS, Examples, Model, finish, parameters_of
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

# recipe
import arc_topk


class ArcTopK(TrainerCallback):
    def __init__(self, trainer, **fields):
        self.trainer, self.fields = trainer, fields

    def on_train_begin(self, args, state, control, **_):
        self.error_feedback = arc_topk.register(self.trainer.model_wrapped, **self.fields)
        if state.global_step > 0:
            self.error_feedback.load(f"{args.output_dir}/checkpoint-{state.global_step}")

    def on_save(self, args, state, control, **_):
        self.error_feedback.save(f"{args.output_dir}/checkpoint-{state.global_step}")


# end


def train(folder: Path, compressed: bool, resume: bool = False) -> list[Tensor]:
    """Accumulates over two batches and clips, which is the Trainer's default."""
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=2, learning_rate=0.01,
        gradient_accumulation_steps=2, save_steps=HALF, use_cpu=True, report_to=[],
        disable_tqdm=True, logging_strategy="no", lr_scheduler_type="constant", seed=0,
        remove_unused_columns=False,
    )  # fmt: skip
    trainer = Trainer(Model(), arguments, train_dataset=Examples(STEPS))
    if compressed:
        trainer.add_callback(ArcTopK(trainer, **CONFIG))
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{HALF}") if resume else None)
    return parameters_of(trainer.model)


def main() -> None:
    plain = train(FOLDER / "plain", compressed=False)
    straight = train(FOLDER / "compressed", compressed=True)
    stopped = train(FOLDER / "compressed", compressed=True, resume=True)
    finish(straight, stopped, plain)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
