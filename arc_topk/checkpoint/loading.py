"""From a checkpoint into the engine: what is checked, and how it moves to other ranks."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from arc_topk import _C
from arc_topk.checkpoint.contents import StateDict, meta_of, zeros_of
from arc_topk.checkpoint.holder import Holder
from arc_topk.plan import make_plan


def restore(
    engine: _C.Exchange, holder: Holder, call: str, state_dict: StateDict, drop_residuals: bool
) -> None:
    """Checks a checkpoint on all ranks, then puts it in the place of what is there."""
    error: Exception | None = None
    loaded: Loaded | None = None
    try:
        loaded = load(holder, state_dict, drop_residuals)
    except Exception as found:  # whatever it is: the other ranks must learn of it
        error = found
    holder.agree(call, error, loaded.facts if loaded else None)
    assert loaded is not None  # else there was an error
    loaded.into(engine)


@dataclass(frozen=True)
class Loaded:
    """A checkpoint that fits: what `_C.Exchange.restore` wants of it.

    Attributes:
        parts: a parameter each.
        steps, compressed_steps: done so far.
        facts: what must be the same on all ranks.
    """

    parts: list[_C.Parts | None]
    steps: int
    compressed_steps: int
    facts: dict[str, str]

    def into(self, engine: _C.Exchange) -> None:
        """Replaces the engine's error feedback."""
        engine.restore(self.parts, self.steps, self.compressed_steps)


def load(holder: Holder, state_dict: StateDict, drop_residuals: bool) -> Loaded:
    """What of a checkpoint this rank takes over.

    Raises:
        ValueError: it is of another model or feedback, damaged, or without the own parts of the
            ranks that this rank goes on for.
    """
    meta = meta_of(state_dict)
    _check_config(holder, meta)
    _check_parameters(holder, meta)
    take = _Taker(holder, state_dict, meta, drop_residuals)
    parts = [take.parts_of(name, tensor) for name, tensor in holder.tensors]
    if meta["world_size"] != holder.group.size():
        _warn_of_other_ranks(holder, meta, drop_residuals)
    shared = hashlib.sha256()
    for alike in (state_dict["shared"], state_dict.get("basis", {})):
        for name in sorted(alike):
            shared.update(_bytes_of(alike[name]))
    facts = {
        "the checkpoint": f"{meta['id']}, of step {meta['steps']}",
        "the shared part of the checkpoint": shared.hexdigest(),
        "drop_residuals": str(drop_residuals),
    }
    return Loaded(parts, meta["steps"], meta["compressed_steps"], facts)


def _bytes_of(tensor: torch.Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _check_config(holder: Holder, meta: dict[str, Any]) -> None:
    found, expected = meta["config"]["feedback"], holder.config.feedback
    if found != expected:
        raise ValueError(
            f"arc_topk: the checkpoint is of feedback='{found}', this {holder.what} of feedback="
            f"'{expected}'; expected the same: the state of one means nothing to another"
        )


def _check_parameters(holder: Holder, meta: dict[str, Any]) -> None:
    shapes = {name: list(tensor.shape) for name, tensor in holder.tensors}
    saved = meta["parameters"]
    for name in shapes:
        if name not in saved:
            raise ValueError(
                f"arc_topk: the checkpoint has no parameter '{name}'; expected the model that it "
                "was saved with"
            )
    for name, shape in saved.items():
        if name not in shapes:
            raise ValueError(
                f"arc_topk: the checkpoint has a parameter '{name}', the model has none of that "
                "name; expected the model that it was saved with"
            )
        if shape != shapes[name]:
            raise ValueError(
                f"arc_topk: parameter '{name}' has shape {shapes[name]}, in the checkpoint "
                f"{shape}; expected the same"
            )


def _warn_of_other_ranks(holder: Holder, meta: dict[str, Any], drop_residuals: bool) -> None:
    if drop_residuals or holder.config.feedback == "none":
        what = "the ranks' own parts are dropped"
    elif holder.config.feedback == "ef14":
        what = "the residuals are dealt out anew, so that what is owed stays the same"
    else:
        what = "every rank's own estimate begins as the shared one"
    warnings.warn(
        f"arc_topk: the checkpoint was saved by {meta['world_size']} ranks, "
        f"{holder.group.size()} go on: {what}",
        stacklevel=2,
    )


class _Taker:
    """Takes one parameter's parts after another out of a checkpoint."""

    def __init__(
        self, holder: Holder, state_dict: StateDict, meta: dict[str, Any], drop_residuals: bool
    ) -> None:
        self._holder = holder
        self._shared: Mapping[str, torch.Tensor] = state_dict["shared"]
        self._bases: Mapping[str, torch.Tensor] = state_dict.get("basis", {})
        self._own: Mapping[str, Mapping[str, Mapping[str, torch.Tensor]]] = state_dict["own"]
        self._started = set(meta["started"])
        self._step: int = meta["steps"]
        old, new, rank = meta["world_size"], holder.group.size(), holder.group.rank()
        self._scale = new / old
        # EF21, EF21M: what is shared says all that another number of ranks can go on from.
        self._afresh = drop_residuals or (old != new and bool(self._shared))
        # For whom this rank goes on: itself, or every new-th of the old ranks.
        self._ranks = [] if self._afresh else list(range(rank, old, new))
        for one in self._ranks:
            if f"rank_{one}" not in self._own:
                there = ", ".join(sorted(key.removeprefix("rank_") for key in self._own))
                raise ValueError(
                    f"arc_topk: the checkpoint holds own parts of the ranks [{there}] of {old}; "
                    f"expected rank {one}'s on rank {rank}: the error feedback of another rank "
                    "would bias the average for good. Save on every rank (State.save(folder), or "
                    "state_dict(), which rank 0 has whole), or load with drop_residuals=True"
                )

    def parts_of(self, name: str, tensor: torch.Tensor) -> _C.Parts | None:
        """What `_C.Exchange.restore` wants of a parameter."""
        basis = self._bases.get(name)
        if basis is not None:
            _check_basis(name, basis)
        saved = [self._shared, self._bases, *self._own.values()]
        if not any(name in parts for parts in saved):
            return None
        ranks = self._holder.group.size()
        plan = make_plan(self._holder.config, [(name, tensor)], ranks, step=self._step)
        (row,) = plan.rows
        own, has_shared, _ = _C.parts_of(self._holder.config.native(), row.kept is not None)
        shared = self._shared.get(name)
        if shared is not None:
            _check_part(name, "shared", shared, tensor)
        if self._afresh:
            a, b = self._fresh_own(own, shared)
        else:
            a, b = (self._own_part(name, key, tensor) for key in ("a", "b"))
        if a is not None and own == 0 and tensor.requires_grad and bool(a.any()):
            raise ValueError(
                f"arc_topk: parameter '{name}' was compressed and stays dense now "
                f"({row.why_dense}); expected a configuration with which it stays compressed: its "
                "error feedback would be lost. Load with drop_residuals=True to do without"
            )
        if own == 0 and tensor.requires_grad:  # zeros
            a = b = None
        if a is None and own > 0 and basis is not None:  # nothing is owed, but there is a basis
            a = zeros_of(self._holder.config, tensor)
        if a is None and shared is None and basis is None:
            return None
        return (
            a,
            b,
            shared if has_shared or not tensor.requires_grad else None,
            basis,
            (name in self._started),
        )

    def _fresh_own(
        self, own: int, shared: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """EF14: nothing is owed. EF21: h_i = h. EF21M: h_i = h, v_i = h."""
        if own == 0 or shared is None:
            return None, None
        if own == 1:
            return shared.clone(), None
        return torch.zeros_like(shared), shared.clone()

    def _own_part(self, name: str, key: str, tensor: torch.Tensor) -> torch.Tensor | None:
        """Of one rank, or the sum that this rank goes on with: (1/N) sum e_i stays the same."""
        parts = [
            parts[key]
            for rank in self._ranks
            if key in (parts := self._own[f"rank_{rank}"].get(name, {}))
        ]
        for part in parts:
            _check_part(name, f"own {key}", part, tensor)
        if not parts:
            return None
        if self._scale == 1:
            return parts[0]
        return (
            torch.stack([part.double() for part in parts])
            .sum(0)
            .mul(self._scale)
            .to(parts[0].dtype)
        )


def _check_basis(name: str, basis: torch.Tensor) -> None:
    """Of any number of columns: as many as fit are taken."""
    usable = basis.layout == torch.strided and basis.dtype == torch.float32 and not basis.is_meta
    if not usable or basis.dim() != 2 or not basis.isfinite().all():
        raise ValueError(
            f"arc_topk: the basis of parameter '{name}' is a tensor of {basis.dtype}, "
            f"{basis.layout}, shape {list(basis.shape)} in the checkpoint; expected finite float32 "
            "numbers, [k, n]: the checkpoint is damaged"
        )


def _check_part(name: str, which: str, part: torch.Tensor, like: torch.Tensor) -> None:
    usable = part.layout == torch.strided and part.is_floating_point() and not part.is_meta
    if not usable or part.shape != like.shape:
        raise ValueError(
            f"arc_topk: the {which} part of parameter '{name}' is a tensor of {part.dtype}, "
            f"{part.layout}, shape {list(part.shape)} in the checkpoint; expected numbers of shape "
            f"{list(like.shape)}"
        )
    if not part.isfinite().all():
        raise ValueError(
            f"arc_topk: the {which} part of parameter '{name}' is not finite in the checkpoint; "
            "error feedback always is: the checkpoint is damaged"
        )
