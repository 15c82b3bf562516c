"""State: the engine of one DDP instance on one rank, with its error feedback."""

from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from arc_topk import _C
from arc_topk.agreement import agree, describe_tensors
from arc_topk.checks import not_ddp, unservable_parameter
from arc_topk.config import Config, config_from
from arc_topk.groups import lane_group
from arc_topk.plan import Plan, make_plan


class State:
    """The configuration and, from its first use on, the engine with its error feedback.

    One object per rank and DDP instance. `register` makes it; make it yourself only for the
    standard form, where a framework owns the DDP wrapper::

        state = arc_topk.State(arc_topk.Config(ratio=0.1))
        ddp.register_comm_hook(state, arc_topk.arc_topk_hook)
        state.bind(ddp)

    Until it is bound or sees its first bucket it touches no process group, and it can be pickled;
    what is pickled is the configuration, not the error feedback.

    Args:
        config: how gradients are averaged; or give its fields as keywords.
        process_group: whose ranks are averaged; None: the DDP instance's once bound, else the
            default group.
        **fields: fields of `Config`, instead of ``config``.

    Raises:
        ValueError, TypeError: from `Config`.
    """

    def __init__(
        self,
        config: Config | None = None,
        *,
        process_group: dist.ProcessGroup | None = None,
        **fields: Any,
    ) -> None:
        self.config = config_from(config, fields)
        self._group = process_group
        self._named: list[tuple[str, torch.Tensor]] | None = None
        self._engine: _C.Exchange | None = None

    def bind(self, ddp: DistributedDataParallel) -> "State":
        """Takes parameter names and process group from ``ddp``, and compares all ranks.

        A collective: every rank must call it, before the first backward pass.

        Args:
            ddp: the wrapped model.

        Returns:
            Itself.

        Raises:
            TypeError: ``ddp`` is not a DistributedDataParallel.
            ValueError: on every rank, if a parameter cannot be served or ranks differ.
        """
        bind_together(self, ddp, None)
        return self

    def plan(self) -> Plan:
        """What is done with each parameter, and the bytes of a compressed step. ``print()`` it.

        Raises:
            RuntimeError: not bound to a DDP instance yet.
        """
        if self._named is None:
            raise RuntimeError(
                "State.plan() needs the parameters: call state.bind(ddp) or use register(ddp)"
            )
        return make_plan(self.config, self._named, dist.get_world_size(self._group))

    def metrics(self) -> dict[str, Any]:
        """Sums over this rank's steps since the beginning or `reset_metrics`.

        Returns:
            ``steps`` and ``compressed_steps`` (since the beginning); ``exchanges`` (of buckets);
            ``collectives``; ``wire_bytes``, handed to the collectives, and ``dense_bytes``, what
            plain averaging would have handed over; ``link_bytes``, sent over this rank's link by
            ring algorithms: 2 (N-1)/N bytes per byte all-reduced, N-1 per byte all-gathered;
            ``energy_captured``, ||C||^2 of the averaged rows over ||mean X||^2 as the sketch
            estimates it (NaN for compressors without a sketch); ``seconds``, a dict by phase: the
            host's, who on a GPU only queues work. A GPU's sums are read back from it, which
            waits for it.
        """
        if self._engine is None:
            raise RuntimeError("State.metrics() has nothing yet: bind(ddp) or run a step first")
        metrics: dict[str, Any] = self._engine.metrics()
        return metrics

    def reset_metrics(self) -> None:
        """Sets the sums of `metrics` to zero; the error feedback stays."""
        if self._engine is not None:
            self._engine.reset_metrics()

    def _ensure_engine(self, device: torch.device) -> _C.Exchange:
        """The engine; made at the first bucket where nobody bound the state before."""
        if self._engine is None:
            group = self._group if self._group is not None else dist.group.WORLD
            if group is None:
                raise RuntimeError("arc_topk: no process group; call init_process_group() first")
            agree(self.config, [], None, group)
            self._connect(group, device)
        assert self._engine is not None
        return self._engine

    def _connect(self, group: dist.ProcessGroup, device: torch.device) -> _C.Exchange:
        self._group = group
        self._engine = _C.Exchange(self.config.native(), group, lane_group(group, device))
        return self._engine

    def __getstate__(self) -> dict[str, Any]:
        if self._group is not None and self._engine is None:
            raise TypeError(
                "a State with an explicit process_group cannot be pickled; leave process_group out "
                "and bind(ddp) in the process that uses it"
            )
        return {"config": self.config}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["config"])  # type: ignore[misc]


def bind_together(
    state: State | None, ddp: DistributedDataParallel, error: Exception | None
) -> State:
    """Compares the ranks, all of them or none; then gives the state its names, group and engine."""
    if not isinstance(ddp, DistributedDataParallel):
        raise not_ddp(ddp)
    named = [
        (name, parameter)
        for name, parameter in ddp.module.named_parameters()
        if parameter.requires_grad and name not in ddp.parameters_to_ignore
    ]
    error = error or unservable_parameter(ddp, named)
    agree(state.config if state else None, describe_tensors(named), error, ddp.process_group)
    assert state is not None  # else there was an error
    state._named = named
    engine = state._engine
    if engine is None:
        engine = state._connect(ddp.process_group, ddp.device)
    for name, parameter in named:
        engine.set_name(parameter, name)
    return state
