"""Lightning: a callback, which the Trainer's own checkpoints take along. torchrun's ranks."""

from __future__ import annotations

from typing import Any

import lightning as L  # noqa: N812
import torch
import torch.distributed as dist
from common import CONFIG, FOLDER, HALF, STEPS, Examples, Model, finish, parameters_of
from torch import Tensor

# recipe
import arc_topk


class ArcTopK(L.Callback):
    def __init__(self, **fields):
        self.error_feedback = arc_topk.State(**fields)

    def on_fit_start(self, trainer, module):
        ddp = trainer.strategy.model
        ddp.register_comm_hook(self.error_feedback, arc_topk.arc_topk_hook)
        self.error_feedback.bind(ddp)

    def state_dict(self):
        return self.error_feedback.state_dict()

    def load_state_dict(self, state):
        self.error_feedback.load_state_dict(state)


# end


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = Model()

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        return self.model(**batch)["loss"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.01)


def train(epochs: int, callbacks: list[L.Callback], resume: str | None = None) -> list[Tensor]:
    """Accumulates over two batches and clips. A loader goes on at an epoch's beginning alone."""
    module = Module()
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=epochs, accumulate_grad_batches=2,
        gradient_clip_val=5.0, callbacks=callbacks, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    data = torch.utils.data.DataLoader(Examples(HALF), batch_size=2)
    trainer.fit(module, data, ckpt_path=resume, weights_only=True if resume else None)
    if epochs == 1:
        trainer.save_checkpoint(FOLDER / "half.ckpt")
    return parameters_of(module)


def main() -> None:
    plain = train(2, [])
    straight = train(2, [ArcTopK(**CONFIG)])
    train(1, [ArcTopK(**CONFIG)])
    callback: Any = ArcTopK(**CONFIG)
    stopped = train(2, [callback], str(FOLDER / "half.ckpt"))
    assert callback.error_feedback.metrics()["steps"] == STEPS
    finish(straight, stopped, plain)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
