"""What `Config.adaptive` can serve, and how its choice is told."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.parallel import DistributedDataParallel

from arc_topk.config import Config


def unadaptable(
    config: Config, ddp: DistributedDataParallel, grad_scaler: torch.amp.GradScaler | None
) -> Exception | None:
    """Why ``adaptive`` cannot be had with this DDP, if it cannot."""
    if not config.adaptive:
        return None
    if ddp.device.type != "cpu":
        return ValueError(
            f"adaptive is True for gradients on device '{ddp.device}'; expected the CPU: the host "
            "only queues a GPU's work, and its times say nothing. arc_topk.advise(ddp) measures "
            "there; choose adaptive=False"
        )
    if grad_scaler is not None and grad_scaler.is_enabled():
        return ValueError(
            "adaptive is True with grad_scaler, whose skipped steps lose what error feedback gives "
            "to a plain average; expected one of them: choose adaptive=False, or autocast to "
            "bfloat16, which needs no scaler"
        )
    return None


def notes_of(choice: tuple[int, list[str], list[float]] | None) -> tuple[str, ...]:
    """`_C.Exchange.choice` in words; nothing without ``adaptive``."""
    if choice is None:
        return ()
    step, forms, seconds = choice
    if step == 0:
        return ("adaptive: each form is tried first, nothing is chosen yet",)
    dense, half, each, compressed = (f"{1e3 * s:.3g} ms" for s in seconds)
    return (
        f"adaptive, chosen in step {step}: {_buckets(forms)}",
        f"from a step's first bucket to its last result: {dense} dense, {half} in bfloat16, "
        f"{compressed} compressed, {each} with each bucket in what is fastest for it",
    )


def _buckets(forms: Sequence[str]) -> str:
    """Which buckets travel how: ``buckets 0, 2 compressed, 1 dense``."""
    if len(set(forms)) == 1:
        return f"all {len(forms)} buckets {forms[0]}" if len(forms) > 1 else f"{forms[0]}"
    by_form = {form: [i for i, f in enumerate(forms) if f == form] for form in dict.fromkeys(forms)}
    return "buckets " + ", ".join(
        f"{', '.join(map(str, places))} {form}" for form, places in by_form.items()
    )
