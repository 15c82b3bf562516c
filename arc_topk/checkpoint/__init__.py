"""Error feedback in checkpoints. contents.py says what is in one."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path

from arc_topk import _C
from arc_topk.checkpoint.contents import StateDict
from arc_topk.checkpoint.files import read, write
from arc_topk.checkpoint.holder import Holder
from arc_topk.checkpoint.loading import restore
from arc_topk.checkpoint.saving import collect


class ErrorFeedback(ABC):
    """What `State` and `GradientExchange` have in common: their error feedback can be saved."""

    _engine: _C.Exchange | None

    @abstractmethod
    def _holder(self) -> Holder:
        """Whose it is; RuntimeError where there is nothing yet."""

    def _held(self) -> tuple[_C.Exchange, Holder]:
        holder = self._holder()
        assert self._engine is not None
        return self._engine, holder

    def state_dict(self, *, gather: bool = True) -> StateDict:
        """A checkpoint: error feedback by parameter, as plain tensors on the CPU.

        A collective, between two steps: every rank calls it, whoever then writes it. Rank 0's holds
        the own parts of all ranks, so that frameworks that save rank 0's dict alone (Accelerate,
        Lightning) save everything: N times the model's size in its memory. Any other rank's holds
        its own; torch.distributed.checkpoint takes both.

        Args:
            gather: False: every rank's dict holds its own parts only, for whoever saves them all.

        Returns:
            ``{"meta": str, "shared": {name: Tensor}, "own": {"rank_i": {name: {"a": Tensor}}}}``.

        Raises:
            RuntimeError: a bucket is in the air; or not all ranks have come within the process
                group's time-out.
            ValueError: on every rank, if ranks have done different numbers of steps.
        """
        return collect(*self._held(), "state_dict()", gather)

    def load_state_dict(self, state_dict: StateDict, *, drop_residuals: bool = False) -> None:
        """Goes on from a checkpoint. A collective, between two steps.

        Saved by another number of ranks: EF21 and EF21M take the shared estimate for every rank's
        own; EF14's residuals are dealt out so that what is owed, (1/N) sum e_i, stays the same. A
        warning says so.

        Args:
            state_dict: what `state_dict` gave, on any rank that has this rank's parts.
            drop_residuals: do without own parts: what EF14 still owes is dropped, EF21 and EF21M
                begin with the shared estimate.

        Raises:
            ValueError: on every rank, before anything is changed: it is of another model, another
                feedback or a newer format; this rank's own parts are not in it; or ranks were given
                different ones.
            RuntimeError: a bucket is in the air; or not all ranks have come within the process
                group's time-out.
        """
        restore(*self._held(), "load_state_dict()", state_dict, drop_residuals)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes a checkpoint into ``folder``: a file a rank, each in one piece, with a checksum.

        A collective, between two steps. The folder is the same one for all ranks, or of the same
        name on each machine; an earlier checkpoint in it is replaced when all ranks have written.

        Raises:
            OSError, ValueError: on every rank, if one of them could not write; the earlier
                checkpoint is still there.
            RuntimeError: as `state_dict`.
        """
        write(*self._held(), Path(folder))

    def load(self, folder: str | os.PathLike[str], *, drop_residuals: bool = False) -> None:
        """Goes on from what `save` wrote, on this or another number of ranks: `load_state_dict`.

        Raises:
            ValueError: on every rank: files are missing, damaged or of different checkpoints; or as
                `load_state_dict`.
            RuntimeError: as `load_state_dict`.
        """
        engine, holder = self._held()
        error: Exception | None = None
        state_dict: StateDict = {}
        try:
            state_dict = read(Path(folder), holder.group.rank(), holder.group.size())
        except Exception as found:  # whatever it is: the other ranks must learn of it
            error = found
        holder.agree("load()", error)
        restore(engine, holder, "load()", state_dict, drop_residuals)
