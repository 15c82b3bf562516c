"""Loss scaling: what the engine needs of a GradScaler."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook


def scale_of(scaler: GradScaler | None, device: torch.device) -> torch.Tensor | None:
    """The number that ``scaler`` multiplies losses with and changes in place; None: with none.

    Args:
        scaler: its number is made now where it has not scaled a loss yet.
        device: of the gradients.

    Raises:
        TypeError: it is no GradScaler.
        ValueError: its number is on another device, which would have to be waited for.
    """
    if scaler is None:
        return None
    if not isinstance(scaler, GradScaler):
        raise TypeError(
            f"grad_scaler is a {type(scaler).__name__}; expected a torch.amp.GradScaler or None"
        )
    if not scaler.is_enabled():
        return None
    if scaler._scale is None:
        scaler._lazy_init_scale_growth_tracker(device)
    scale = scaler._scale
    assert scale is not None
    if scale.device != device:
        raise ValueError(
            f"grad_scaler has its scale on device '{scale.device}'; expected '{device}', where the "
            "gradients are"
        )
    return scale


def describe_scaler(scale: torch.Tensor | None) -> str:
    """For comparison across ranks."""
    return "None" if scale is None else f"scale {scale.item():g}"


# --- one optimizer
# ---------------------------------------------------------------------------------


@dataclass
class _Watch:
    scale: torch.Tensor
    optimizer: weakref.ref[Optimizer] | None = None


_watches: weakref.WeakKeyDictionary[GradScaler, _Watch] = weakref.WeakKeyDictionary()
_hooked = False


def watch(scaler: GradScaler, scale: torch.Tensor) -> None:
    """Has the optimizers of ``scaler`` refuse to step where there are several.

    A scaler may skip the step of one of them and not of the other, and lowers its scale either way.
    """
    global _hooked
    _watches[scaler] = _Watch(scale)
    if not _hooked:
        register_optimizer_step_pre_hook(_check)
        _hooked = True


def _check(optimizer: Optimizer, *_: Any) -> None:
    for scaler, watched in list(_watches.items()):
        steps = scaler._per_optimizer_states  # since its last update()
        if id(optimizer) not in steps:
            continue
        known = watched.optimizer() if watched.optimizer is not None else None
        if len(steps) > 1 or (known is not None and known is not optimizer):
            raise RuntimeError(
                "arc_topk: the grad_scaler given to register() or bind() has a second optimizer, a "
                f"{type(optimizer).__name__}; expected one, for what a skipped step has sent is "
                "given back, and a scaler does not tell whose step it has skipped. Give each "
                "optimizer a GradScaler of its own (or bind() again, where a new optimizer takes "
                "the place of an old one)"
            )
        if scaler._scale is not watched.scale:
            raise RuntimeError(
                "arc_topk: the grad_scaler given to register() or bind() has another scale tensor "
                "than then; expected one that is changed in place: bind() again"
            )
        watched.optimizer = weakref.ref(optimizer)
