"""One run, on one rank: what every task and every method has in common."""

from __future__ import annotations

import gc
import math
import platform
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import arc_topk
from evidence.averaging import LOCAL_STEPS, Averaging, attach
from evidence.budget import OutOfReachError
from evidence.methods import METHODS
from evidence.runs import Record, Run
from evidence.tasks import TASKS, Task

CHECKPOINTS = 12  # validations of a run


def train(run: Run) -> Record:
    """Trains on the default group's ranks, all of which call it.

    Args:
        run: with lr and beta1.

    Returns:
        ``loss``: validation loss at checkpoints, [step, loss] each, None where it is not finite and
        the run ends; ``residual``, |mean e| / |mean g| there, where the task asks for it;
        ``wire_bytes``, ``link_bytes``, ``dense_bytes`` of a rank, the mean of a step;
        ``seconds`` of the training; what followed from the budget; versions and processor. Of a
        budget that the method cannot keep: ``least``, the smallest share that it can.
    """
    task = TASKS[run.task]
    torch.manual_seed(run.seed)  # the same parameters on every rank
    model = task.model()
    try:
        averaging = attach(METHODS[run.method], model, run.budget, run.seed)
    except OutOfReachError as error:
        return {"least": error.least}
    torch.manual_seed(run.seed + 1 + dist.get_rank())  # dropout of its own on every rank
    started = time.perf_counter()
    loss, residual = _train(run, task, model, averaging)
    seconds = time.perf_counter() - started
    wire, link = averaging.sent()
    steps = loss[-1][0]
    record = {
        "loss": loss,
        "wire_bytes": wire / steps,
        "link_bytes": link / steps,
        "dense_bytes": sum(4 * p.numel() for p in model.parameters()),
        "seconds": round(seconds, 2),
        **({"residual": residual} if residual else {}),
        **averaging.chosen,
        **machine(),
    }
    del averaging
    gc.collect()  # ends the hook's threads before the next run
    return record


def _train(
    run: Run, task: Task, model: nn.Module, averaging: Averaging
) -> tuple[list[list[Any]], list[list[Any]]]:
    """Losses and residuals, by steps."""
    optimizer = task.optimizer(model.parameters(), run.lr, run.beta1)
    schedule = LambdaLR(optimizer, lambda step: task.schedule(step, run.steps))
    batches = task.batches(dist.get_rank(), dist.get_world_size(), run.seed)
    every = max(1, run.steps // CHECKPOINTS // LOCAL_STEPS) * LOCAL_STEPS  # where ranks are alike
    losses: list[list[Any]] = []
    residuals: list[list[Any]] = []
    for step in range(1, run.steps + 1):
        optimizer.zero_grad()
        batch = next(batches)
        averaging.module(batch).backward()
        if task.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), task.clip)
        optimizer.step()
        schedule.step()
        averaging.after_step()
        if step == run.steps or (step % every == 0 and run.steps - step >= every // 2):
            loss = validate(task, model)
            losses.append([step, loss if math.isfinite(loss) else None])
            if not math.isfinite(loss):
                break
            residual = averaging.residual(batch) if task.weighs_residuals else None
            if residual is not None:
                residuals.append([step, round(residual, 4)])
    return losses, residuals


@torch.no_grad()
def validate(task: Task, model: nn.Module) -> float:
    """Mean loss over the task's validation batches, which the ranks share. A collective."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    batches = task.validation()
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches[rank::ranks]:
        total += model(batch).double()
    model.train()
    dist.all_reduce(total)
    return total.item() / len(batches)


def machine() -> dict[str, str]:
    """Versions and processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "torch": torch.__version__,
        "arc_topk": arc_topk.__version__,
        "python": platform.python_version(),
        "cpu": names[0] if names else platform.processor(),
        "isa": arc_topk._C.cpu_isa(),
    }
