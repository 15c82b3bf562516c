"""EF21 and EF21M take every synchronised backward for a step of their own: told, not guessed."""

from __future__ import annotations

import warnings
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from arc_topk.state import State

# An optimizer's hooks, and the states they watch. A hook cannot remove itself: the optimizer is
# just going through them.
_watches: weakref.WeakKeyDictionary[
    torch.optim.Optimizer, list[tuple[weakref.ref[State], RemovableHandle]]
] = weakref.WeakKeyDictionary()


def warn_of_accumulation(state: State, optimizer: torch.optim.Optimizer) -> None:
    """Has ``optimizer`` warn, once, where several synchronised backwards make one of its steps.

    DDP hands over the second one with what ``.grad`` holds already, so that the gradient seems to
    jump between one backward and the next: EF21's estimate follows neither. EF14 owes what it has
    not sent, whatever it was.
    """
    if state.config.feedback not in ("ef21", "ef21m"):
        return
    watched = weakref.ref(state)
    before: int | None = None
    warned = False

    def compare(*_: Any) -> None:
        nonlocal before, warned
        state = watched()
        if state is None or warned:
            return
        steps = state._steps()
        if before is not None and steps > before + 1:
            warned = True
            warnings.warn(
                f"arc_topk: {steps - before} synchronised backward passes made one optimizer step; "
                f"with feedback='{state.config.feedback}' what they add up to is not the average "
                "of the sum. Put all but the last under ddp.no_sync(), or choose feedback='ef14'. "
                "(Where the optimizer skipped steps and the gradients were zeroed, all is well)",
                stacklevel=4,
            )
        before = steps

    alive = []
    for ref, handle in _watches.get(optimizer, []):
        if ref() is None:
            handle.remove()
        else:
            alive.append((ref, handle))
    _watches[optimizer] = [*alive, (watched, optimizer.register_step_post_hook(compare))]
