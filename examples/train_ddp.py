"""Trains a byte-level language model with DistributedDataParallel and compressed gradients.

What arc_topk adds to a plain DDP script is two lines, both marked with ``# <- arc_topk`` below.
``python examples/train_ddp.py --help`` explains the rest.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from launch import RunFailedError, check_same_parameters, device_of, launch
from log import Log, Record
from text import Windows, load
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformer import ByteTransformer

import arc_topk  # <- arc_topk, line 1 of 2

DESCRIPTION = """\
Trains a byte-level transformer on the source files of Python's standard library (or any file), on
several ranks, with gradients compressed by arc_topk."""

EPILOG = """\
examples:
  python examples/train_ddp.py                          four ranks here, ARC-Top-K with EF14 at 10 %
  python examples/train_ddp.py --compressor dense --lr 5e-3
                                                        what it is to be compared with
  python examples/train_ddp.py --feedback ef21m --eta 0.3 --betas 0 0.99 --lr 6e-3
                                                        the paper's error feedback
  python examples/train_ddp.py --device cuda --ranks 2  on two GPUs, with NCCL
  torchrun --nproc-per-node 4 examples/train_ddp.py --data war_and_peace.txt
                                                        torchrun starts the ranks, on your own text
  python examples/train_ddp.py --checkpoint run.pt --save-every 100
  python examples/train_ddp.py --resume run.pt --steps 1200
                                                        save, and go on later
  python examples/train_ddp.py --demo                   compare seven ways; table, picture: demo/

choosing settings:
  Error feedback sends what was held back some steps later, in one piece. Momentum in the optimizer
  (beta1) on top of that delays it again: try --betas 0 0.99 and 0.5 0.99, leave 0.9 to dense runs.
  Tune --lr anew for each compressor; it matters as much as the compressor does.

reading the numbers:
  wire bytes   what a rank hands to the collectives: indices and sketches are counted
  link bytes   what a rank then really sends, by the ring algorithms: an all-reduce of B bytes sends
               2 (N-1)/N B, an all-gather of B bytes a rank sends (N-1) B. Compare by these.
"""


def parser() -> argparse.ArgumentParser:
    """The command line; ``--help`` is its documentation."""
    p = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = p.add_argument
    add("--ranks", type=int, default=4, help="processes to start here; under torchrun, torchrun's")
    add("--device", choices=("cpu", "cuda"), default="cpu",
        help="cuda: NCCL, and a GPU for each rank (default %(default)s)")  # fmt: skip
    add("--seed", type=int, default=0, help="of parameters, data order and the compressor")

    group = p.add_argument_group("data and model")
    add = group.add_argument
    add("--data", type=Path, help="text to learn; its last tenth is for validation")
    add("--context", type=int, default=64, help="bytes the model looks back (default %(default)s)")
    add("--width", type=int, default=128, help="hidden size (default %(default)s)")
    add("--layers", type=int, default=2, help="transformer blocks (default %(default)s)")
    add("--heads", type=int, default=4, help="attention heads (default %(default)s)")
    add("--dropout", type=float, default=0.0, help="default %(default)s")

    group = p.add_argument_group("compression: the fields of arc_topk.Config")
    add = group.add_argument
    add("--compressor", default="arc_topk",
        choices=("dense", "arc_topk", "low_rank", "rand_k", "top_k"),
        help="how gradients are averaged (default %(default)s); dense: as plain DDP")  # fmt: skip
    add("--feedback", default="ef14", choices=("none", "ef14", "ef21", "ef21m"),
        help="what becomes of what was not sent; ef21m is the paper's")  # fmt: skip
    add("--ratio", type=float, default=0.1,
        help="kept share of a matrix's rows, low rank: of its bytes; 0 to 1")  # fmt: skip
    add("--rank", type=int, help="columns of low rank's factors (default: by --ratio)")
    add("--eta", type=float, help="momentum of ef21m, 0 to 1 (default 0.1); only with ef21m")
    add("--sketch-dim", type=int, default=4, help="columns of the sketch (default %(default)s)")
    add("--row-width", type=int, help="rows are runs of this many elements (default: natural rows)")

    add("--wire-dtype", choices=("float32", "bfloat16", "float16", "uint8"),
        help="what rows and second factors travel in (default: uint8 for ARC-Top-K and low rank "
        "with ef14, else float32)")  # fmt: skip
    add("--sketch-dtype", choices=("bfloat16",),
        help="what sketches and first factors travel in (default: float32)")  # fmt: skip
    add("--start-step", type=int, default=0,
        help="steps of plain averaging before compression (default %(default)s)")  # fmt: skip

    group = p.add_argument_group("training")
    add = group.add_argument
    add("--steps", type=int, default=600, help="default %(default)s")
    add("--batch", type=int, default=8, help="sequences a rank and step (default %(default)s)")
    add("--lr", type=float, default=1e-2, help="highest learning rate (default %(default)s)")
    add("--betas", type=float, nargs=2, default=(0.5, 0.99), metavar=("B1", "B2"),
        help="of AdamW (default 0.5 0.99)")  # fmt: skip
    add("--weight-decay", type=float, default=0.01, help="of AdamW (default %(default)s)")
    add("--warmup", type=int, default=50, help="steps of rising learning rate, before its cosine")
    add("--clip", type=float, default=1.0, help="largest gradient norm; 0 turns clipping off")

    group = p.add_argument_group("validation, logs, checkpoints")
    add = group.add_argument
    add("--validate-every", type=int, default=50, help="steps (default %(default)s)")
    add("--validation-windows", type=int, default=1024, help="sequences (default %(default)s)")
    add("--csv", type=Path, help="write a line a step to this file")
    add("--tensorboard", type=Path, metavar="DIR", help="write a TensorBoard log, if installed")
    add(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="save here at the end of the run; {step} in the name becomes the step",
    )
    add("--save-every", type=int, default=0, metavar="STEPS", help="... and every so many steps")
    add("--resume", type=Path, metavar="FILE",
        help="go on from a checkpoint: model, optimizer, schedule, place in the data, random "
        "numbers and error feedback. Another --ranks, --steps, --compressor or --ratio is fine; "
        "--feedback must be the same")  # fmt: skip

    group = p.add_argument_group("demo")
    add = group.add_argument
    add("--demo", action="store_true", help="train seven ways one after the other and compare")
    add("--quick", action="store_true", help="with --demo: a few steps each, to check that it runs")
    add("--out", type=Path, default=Path("demo"), help="folder of the demo's output (demo/)")
    return p


@dataclasses.dataclass
class Outcome:
    """What one training run measured; the same on every rank but for the times."""

    steps: int  # of this run, without those before a resume
    validation: list[tuple[int, float, int]]  # step, loss, link bytes sent by a rank so far
    step_ms: float  # median
    plan: Any  # arc_topk.Plan
    metrics: dict[str, Any]  # State.metrics() at the end


def train(options: argparse.Namespace, title: str = "train") -> Outcome:
    """Trains one model on the ranks of the default process group.

    Args:
        options: what ``parser()`` makes.
        title: of the progress bar.

    Returns:
        The run's measurements.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = device_of(options)
    training_text, validation_text = load(options.data)
    data = Windows(training_text, options.context, options.batch, rank, ranks, options.seed)

    torch.manual_seed(options.seed)  # the same parameters on every rank
    model = ByteTransformer(
        options.context, options.width, options.layers, options.heads, options.dropout
    ).to(device)
    torch.manual_seed(options.seed + 1 + rank)  # dropout of its own on every rank
    ddp = DistributedDataParallel(model)
    state = arc_topk.register(ddp, **compression(options))  # <- arc_topk, line 2 of 2
    optimizer = AdamW(
        ddp.parameters(), options.lr, tuple(options.betas), weight_decay=options.weight_decay
    )
    schedule = LambdaLR(optimizer, lambda step: warmup_cosine(step, options.warmup, options.steps))

    training = Training(model, optimizer, schedule, data, state)
    if options.resume:
        training.load(options.resume)
        if training.step >= options.steps:
            raise RunFailedError(
                f"--steps must exceed the {training.step} steps of {options.resume}, "
                f"got {options.steps}: pass the total, those before the checkpoint included"
            )
    first = training.step
    validation: list[tuple[int, float, int]] = []
    step_ms: list[float] = []
    with Log(title, first, options.steps, options.csv, options.tensorboard, rank == 0) as log:
        if options.resume:
            log.say(f"resumed {options.resume} at step {first}, error feedback included")
        while training.step < options.steps:
            started = time.perf_counter()
            learning_rate = schedule.get_last_lr()[0]
            loss = ddp(data.next().to(device))
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(ddp.parameters(), options.clip or math.inf)
            optimizer.step()
            schedule.step()
            training.step += 1
            step_ms.append(1e3 * (time.perf_counter() - started))

            metrics = state.metrics()
            sent = metrics["wire_bytes"], metrics["link_bytes"]
            record = Record(
                training.step, loss.item(), learning_rate, norm.item(), step_ms[-1], *sent
            )
            if due(training.step, options.validate_every, options.steps):
                record.validation_loss = validate(model, validation_text, options)
                validation.append((record.step, record.validation_loss, record.link_bytes))
            log.write(record)
            if options.checkpoint and due(training.step, options.save_every, options.steps):
                training.save(Path(str(options.checkpoint).replace("{step}", str(training.step))))
    check_same_parameters(model)
    return Outcome(
        len(step_ms), validation, statistics.median(step_ms), state.plan(), state.metrics()
    )


def due(step: int, every: int, steps: int) -> bool:
    """Whether something done every so many steps (0: never) and at the end is to be done now."""
    return step == steps or (every > 0 and step % every == 0)


def compression(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of arc_topk.Config, from the command line's flags of the same names."""
    names = ("compressor", "feedback", "ratio", "rank", "eta", "sketch_dim", "row_width",
             "start_step", "seed")  # fmt: skip
    types = {name: getattr(options, name) for name in ("wire_dtype", "sketch_dtype")}
    return {
        **{name: getattr(options, name) for name in names},
        **{name: type and getattr(torch, type) for name, type in types.items()},
    }


def warmup_cosine(step: int, warmup: int, steps: int) -> float:
    """Share of the highest learning rate at a step from 0 on: linear up, then half a cosine."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


@torch.no_grad()
def validate(model: ByteTransformer, text: Tensor, options: argparse.Namespace) -> float:
    """Mean loss over the same windows every time, in nats a byte; the ranks share the work."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    batch = 32
    batches = max(1, options.validation_windows // (batch * ranks))
    data = Windows(text, options.context, batch, rank, ranks, seed=0)
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    for _ in range(batches):
        total += model(data.next().to(device_of(options))).double().cpu()
    model.train()
    dist.all_reduce(total)
    return total.item() / (batches * ranks)


@dataclasses.dataclass
class Training:
    """What a checkpoint holds."""

    model: nn.Module
    optimizer: AdamW
    schedule: LambdaLR
    data: Windows
    state: arc_topk.State
    step: int = 0

    def save(self, path: Path) -> None:
        """Writes a checkpoint from rank 0, in one piece or not at all; every rank must call."""
        rank, ranks = dist.get_rank(), dist.get_world_size()
        random_states: list[Any] = [None] * ranks
        dist.gather_object(torch.get_rng_state(), random_states if rank == 0 else None)
        error_feedback = self.state.state_dict()  # of all ranks, on rank 0
        if rank == 0:
            content = {
                "step": self.step,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "position": self.data.position,
                "random_states": random_states,
                "error_feedback": error_feedback,
            }
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(path.name + ".partial")
            torch.save(content, partial)
            os.replace(partial, path)
        dist.barrier()

    def load(self, path: Path) -> None:
        """Takes everything from a checkpoint; ranks that it does not know keep their fresh numbers.

        Raises:
            RuntimeError: the checkpoint's model has other shapes (load_state_dict names them).
            RunFailedError: it was saved with another --feedback, or is not whole.
        """
        content = torch.load(path, weights_only=True)
        try:
            self.state.load_state_dict(content["error_feedback"])
        except ValueError as error:
            raise RunFailedError(f"--resume {path}: {error}") from error
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.schedule.load_state_dict(content["schedule"])
        self.data.position = content["position"]
        self.step = content["step"]
        if dist.get_rank() < len(content["random_states"]):
            torch.set_rng_state(content["random_states"][dist.get_rank()])


def work(options: argparse.Namespace) -> None:
    """What one rank does without ``--demo``."""
    outcome = train(options)
    if dist.get_rank() == 0:
        print(outcome.plan)


def main() -> int:
    """Runs the command line; returns the exit status."""
    options = parser().parse_args()
    if options.demo:
        import demo

        return launch(demo.work, demo.prepare(options))
    return launch(work, options)


if __name__ == "__main__":
    sys.exit(main())
