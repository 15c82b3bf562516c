"""From the engine into a checkpoint."""

from __future__ import annotations

import uuid

import torch
import torch.distributed as dist

from arc_topk import _C
from arc_topk.checkpoint.contents import OwnParts, StateDict, meta_text, zeros_of
from arc_topk.checkpoint.holder import Holder
from arc_topk.groups import current
from arc_topk.plan import make_plan


def collect(engine: _C.Exchange, holder: Holder, call: str, gather: bool) -> StateDict:
    """The checkpoint: this rank's own parts, and on rank 0 with ``gather`` those of all ranks."""
    error: Exception | None = None
    snapshot: tuple[list[tuple[str, _C.Parts | None]], int, int] = ([], 0, 0)
    try:
        snapshot = engine.snapshot()
    except Exception as found:  # whatever it is: the other ranks must learn of it
        error = found
    slots, steps, compressed_steps = snapshot
    started = [name for name, parts in slots if parts is not None and parts[4]]
    facts = {"the number of steps": str(steps), "what EF21 has started": str(started)}
    holder.agree(call, error, facts)

    own: OwnParts = {}
    shared: dict[str, torch.Tensor] = {}
    bases: dict[str, torch.Tensor] = {}
    for (name, parts), (_, tensor) in zip(slots, holder.tensors, strict=True):
        if parts is None:
            parts = _fresh_parts(holder, name, tensor)
        elif holder.config.warmup_steps:
            parts = _as_ever(parts, _fresh_parts(holder, name, tensor))
        a, b, h, basis, _ = parts
        own_parts = {key: part for key, part in (("a", a), ("b", b)) if part is not None}
        if own_parts:
            own[name] = own_parts
        if h is not None:
            shared[name] = h
        if basis is not None:
            bases[name] = basis
    meta = meta_text(
        holder.config,
        _same_everywhere(holder, uuid.uuid4().hex),
        holder.group.size(),
        steps,
        compressed_steps,
        {name: tensor.shape for name, tensor in holder.tensors},
        started,
    )
    ranks = _gathered(holder, own) if gather else {holder.group.rank(): own}
    named = {f"rank_{rank}": parts for rank, parts in ranks.items()}
    saved: StateDict = {"meta": meta, "shared": shared, "own": named}
    return saved | ({"basis": bases} if holder.config.compressor == "low_rank" else {})


def _fresh_parts(holder: Holder, name: str, tensor: torch.Tensor) -> _C.Parts:
    """Those of a parameter that has not been averaged yet: zeros, so that there are the same keys.

    Who loads by keys (torch.distributed.checkpoint) reads into the fresh State's.
    """
    if not tensor.requires_grad:
        return None, None, None, None, False
    row = make_plan(holder.config, [(name, tensor)], holder.group.size()).rows[0]
    own, shared, has_basis = _C.parts_of(holder.config.native(), row.kept is not None)

    def zeros(there: bool) -> torch.Tensor | None:
        return zeros_of(holder.config, tensor) if there else None

    basis = None
    if has_basis and row.view is not None and row.kept is not None:
        # What a warm-up begins with has more columns than it ends with.
        columns = min(row.view) if holder.config.warmup_steps else row.kept
        basis = torch.zeros(columns, row.view[1])
    return zeros(own > 0), zeros(own > 1), zeros(shared), basis, False


def _as_ever(parts: _C.Parts, fresh: _C.Parts) -> _C.Parts:
    """The same keys and sizes in every stage of a warm-up, for who loads by keys.

    A tensor that is not compressed yet owes nothing, and under EF21M its h_i are h. Where it is a
    matrix of one row until then, as low rank has them on bytes, its basis says nothing.
    """
    a, b, h, basis, started = parts
    zeros, momentum, _, wide, _ = fresh
    if a is None and h is not None and zeros is not None and momentum is not None:
        a, b = torch.zeros_like(h), h.clone()
    if wide is None or basis is None:
        return a, b, h, wide, started
    known = wide.clone()
    if basis.size(1) == wide.size(1):
        known[: len(basis)] = basis[: len(wide)]
    return a, b, h, known, started


def _same_everywhere(holder: Holder, text: str) -> str:
    """Rank 0's."""
    texts = [text]
    with current(holder.device):
        dist.broadcast_object_list(texts, group=holder.group, group_src=0)
    return texts[0]


def _gathered(holder: Holder, own: OwnParts) -> dict[int, OwnParts]:
    """All ranks' own parts, on rank 0; elsewhere this rank's. One part at a time."""
    if holder.group.rank() != 0:
        for parts in own.values():
            for part in parts.values():
                _gather(holder, part)
        return {holder.group.rank(): own}
    ranks: dict[int, OwnParts] = {rank: {} for rank in range(holder.group.size())}
    for name, parts in own.items():
        for key, part in parts.items():
            for rank, theirs in enumerate(_gather(holder, part)):
                ranks[rank].setdefault(name, {})[key] = theirs
    return ranks


def _gather(holder: Holder, part: torch.Tensor) -> list[torch.Tensor]:
    """All ranks' ``part``, on rank 0. As bytes: not every backend gathers every dtype."""
    mine = part.reshape(-1).view(torch.uint8).to(holder.device)
    first = holder.group.rank() == 0
    parts = [torch.empty_like(mine) for _ in range(holder.group.size())] if first else []
    if part.numel() > 0:
        dist.gather(mine, parts or None, group=holder.group, group_dst=0)
    return [theirs.cpu().view(part.dtype).reshape(part.shape) for theirs in parts]
