"""EF21 and EF21M take every synchronised backward for a step of their own: told, not guessed."""

from __future__ import annotations

import warnings
import weakref
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from arc_topk.state import State


def warn_of_accumulation(state: State, optimizer: torch.optim.Optimizer) -> None:
    """Has ``optimizer`` warn, once, where several synchronised backwards make one of its steps.

    DDP hands over the second one with what ``.grad`` holds already, so that the gradient seems to
    jump between one backward and the next: EF21's estimate follows neither. EF14 owes what it has
    not sent, whatever it was.
    """
    if state.config.feedback not in ("ef21", "ef21m"):
        return
    watched = weakref.ref(state)
    before = state._steps()

    def compare(*_: Any) -> None:
        nonlocal before
        state = watched()
        if state is None:
            hook.remove()
            return
        steps = state._steps()
        if steps > before + 1:
            warnings.warn(
                f"arc_topk: {steps - before} synchronised backward passes made one optimizer step; "
                f"with feedback='{state.config.feedback}' what they add up to is not "
                "the average of the sum. Put all but the last under ddp.no_sync(), or choose "
                "feedback='ef14'",
                stacklevel=4,
            )
            hook.remove()
        before = steps

    hook = optimizer.register_step_post_hook(compare)
