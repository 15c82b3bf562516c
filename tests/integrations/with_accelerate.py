"""Accelerate: two lines behind prepare(). torchrun's ranks."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from common import CONFIG, FOLDER, HALF, STEPS, Examples, Model, finish, parameters_of
from torch import Tensor

import arc_topk


def train(first: int, last: int, compressed: bool, save: bool = False) -> list[Tensor]:
    """Accumulates over two batches and clips."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    data = torch.utils.data.DataLoader(Examples(STEPS), batch_size=2)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    if compressed:
        # recipe
        error_feedback = arc_topk.register(model, **CONFIG)
        accelerator.register_for_checkpointing(error_feedback)
        # end
    if first > 0:
        accelerator.load_state(FOLDER / "half")
    for number, batch in enumerate(data):
        if not 2 * first <= number < 2 * last:
            continue
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch)["loss"])
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            optimizer.zero_grad()
    if compressed:
        assert error_feedback.metrics()["steps"] == last
    if save:
        accelerator.save_state(FOLDER / "half")
    return parameters_of(model)


def main() -> None:
    plain = train(0, STEPS, compressed=False)
    straight = train(0, STEPS, compressed=True)
    train(0, HALF, compressed=True, save=True)
    stopped = train(HALF, STEPS, compressed=True)
    finish(straight, stopped, plain)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
