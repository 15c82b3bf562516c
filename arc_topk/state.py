"""State: the engine of one DDP instance on one rank, with its error feedback."""

import math
import uuid
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import Unpack

from arc_topk import _C
from arc_topk.accumulation import warn_of_accumulation
from arc_topk.adaptive import notes_of, unadaptable
from arc_topk.agreement import agree, describe_tensors, equal, gather
from arc_topk.checkpoint import ErrorFeedback
from arc_topk.checkpoint.contents import StateDict, empty, meta_of
from arc_topk.checkpoint.holder import Holder
from arc_topk.checkpoint.loading import Loaded, load
from arc_topk.checks import ddp_in, unservable_parameter
from arc_topk.config import Config, Fields, config_from
from arc_topk.groups import (
    Transport,
    ambiguous,
    comm_groups_for,
    current,
    default_group,
    timeout_of,
    transport_of,
)
from arc_topk.meeting import WAIT
from arc_topk.optimizer_rules import warn_of_settings
from arc_topk.plan import Plan, make_plan
from arc_topk.scaling import describe_scaler, scale_of, watch


class State(ErrorFeedback):
    """The configuration and, from its first use on, the engine with its error feedback.

    One object per rank and DDP instance. `register` makes it; make it yourself only for the
    standard form, where a framework owns the DDP wrapper::

        state = arc_topk.State(arc_topk.Config(ratio=0.1))
        ddp.register_comm_hook(state, arc_topk.arc_topk_hook)
        state.bind(ddp)

    Until it is bound or sees its first bucket it touches no process group, and it can be pickled;
    what is pickled is the configuration, not the error feedback. That goes into checkpoints by
    `state_dict` and `load_state_dict`, or `save` and `load`.

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
        **fields: Unpack[Fields],
    ) -> None:
        self.config = config_from(config, fields)
        self._group = process_group
        # Shapes only: a state keeps no model alive. With those that are frozen now.
        self._every: list[tuple[str, torch.Tensor]] | None = None
        # Loaded before there was anything to load it into.
        self._pending: tuple[StateDict, bool] | None = None
        self._engine: _C.Exchange | None = None
        self._transport: Transport | None = None
        self._device = torch.device("cpu")
        self._scaled = False  # by a GradScaler that the engine knows

    def __repr__(self) -> str:
        config = self.config
        what = f"{config.compressor}, {config.feedback}, ratio={config.ratio:g}"
        if self._group is None or self._transport is None or self._engine is None:
            return f"<arc_topk.State: {what}; not bound yet>"
        parameters = f"{len(self._named())} parameters, " if self._every is not None else ""
        return (
            f"<arc_topk.State: {what}; {parameters}{self._group.size()} ranks over "
            f"{self._transport.name}, {self._steps()} steps>"
        )

    def bind(
        self,
        ddp: torch.nn.Module,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> "State":
        """Takes parameter names and process group from ``ddp``, and compares all ranks.

        A collective: every rank must call it, before the first backward pass. A state that was used
        before goes on with ``ddp``: its error feedback is taken over by the parameters' names, and
        what is still in the air is given up. All ranks go on from the latest step of any of them.
        Where they have come apart (a backward pass that failed half-way, another process group),
        EF21 and EF21M begin with a dense step again; residuals of EF14 are kept as they are.

        Args:
            ddp: the wrapped model, as for `register`.
            optimizer: as for `register`.
            grad_scaler: as for `register`. For a state that was used without one while the loss was
                scaled, `rescale_` comes first, by 1 over the scale.

        Returns:
            Itself.

        Raises:
            TypeError: there is no DistributedDataParallel in ``ddp``, or more than one;
                ``grad_scaler`` is no GradScaler.
            ValueError: on every rank, if a parameter cannot be served, the state is of another
                model or another number of ranks, or ranks differ.
            RuntimeError: a rank has not called it within a minute (for a state that was used: the
                process group's time-out); names it. Then it may be called again.
        """
        bind_together(self, ddp_in(ddp), None, "State.bind(ddp)", grad_scaler)
        if optimizer is not None:
            warn_of_accumulation(self, optimizer)
            warn_of_settings(self.config, optimizer)
        return self

    def plan(self) -> Plan:
        """What is done with each parameter, and the bytes of a compressed step. ``print()`` it.

        Raises:
            RuntimeError: not bound to a DDP instance yet.
        """
        if self._every is None:
            raise RuntimeError(
                "State.plan() needs the parameters: call state.bind(ddp) or use register(ddp)"
            )
        assert self._transport is not None
        assert self._engine is not None
        return make_plan(
            self.config,
            self._named(),
            dist.get_world_size(self._group),
            self._transport.name,
            notes=notes_of(self._engine.choice()),
        )

    def _named(self) -> list[tuple[str, torch.Tensor]]:
        """The parameters that are trained."""
        return [(name, p) for name, p in self._every or [] if p.requires_grad]

    def metrics(self) -> dict[str, Any]:
        """Sums over this rank's steps since the beginning or `reset_metrics`.

        Returns:
            ``steps`` and ``compressed_steps`` (since the beginning); ``exchanges`` (of buckets);
            ``collectives``; ``wire_bytes``, handed to the collectives, and ``dense_bytes``, what
            plain averaging would have handed over; ``link_bytes``, sent over this rank's link by
            ring algorithms: 2 (N-1)/N bytes per byte all-reduced, N-1 per byte all-gathered;
            ``energy_captured``, ||C||^2 of the averaged rows over ||mean X||^2 as the sketch
            estimates it (NaN for compressors without a sketch); ``seconds``, a dict by phase: the
            host's, who on a GPU only queues work; ``transport``, what payloads travel over:
            ``"gloo"``, ``"nccl2"``, ``"gloo, staged through the host"``. A GPU's sums are read back
            from it, which waits for it.
        """
        if self._engine is None:
            raise RuntimeError("State.metrics() has nothing yet: bind(ddp) or run a step first")
        assert self._transport is not None
        return {**self._engine.metrics(), "transport": self._transport.name}

    def state_dict(self, *, gather: bool = True) -> StateDict:
        """See `ErrorFeedback.state_dict`. Before `bind` there are no parameters to tell of."""
        if self._engine is None:
            return empty(self.config) if self._pending is None else self._pending[0]
        return super().state_dict(gather=gather)

    def load_state_dict(self, state_dict: StateDict, *, drop_residuals: bool = False) -> None:
        """See `ErrorFeedback.load_state_dict`. Before `bind`, `bind` checks it and raises."""
        if self._engine is None:
            meta_of(state_dict)
            self._pending = (state_dict, drop_residuals)
            return
        super().load_state_dict(state_dict, drop_residuals=drop_residuals)

    def _holder(self) -> Holder:
        if self._engine is None or self._every is None:
            raise RuntimeError(
                "arc_topk: the State is not bound, its parameters have no names; expected "
                "state.bind(ddp), or register(ddp), before error feedback is saved or loaded"
            )
        assert self._group is not None
        return Holder("State", self.config, self._group, self._device, self._every)

    def rescale_(self, factor: float) -> "State":
        """Multiplies all error feedback: for gradients that are ``factor`` times as large from now.

        For loss scaling that the engine does not know of; with ``grad_scaler`` given to `register`
        or `bind` nothing is to be done. A collective: every rank must call it with the same factor,
        between two backward passes::

            before = scaler.get_scale()
            scaler.update()
            if scaler.get_scale() != before:
                state.rescale_(scaler.get_scale() / before)

        Args:
            factor: positive and finite.

        Returns:
            Itself.

        Raises:
            ValueError: on every rank, if the factor is not such or differs between ranks, or there
                is a ``grad_scaler``.
            RuntimeError: not bound and no step made yet; a bucket is being exchanged; or a rank has
                not called it within a minute, which is named.
        """
        if self._engine is None or self._group is None:
            raise RuntimeError(
                "State.rescale_(factor) has nothing yet: bind(ddp) or run a step first"
            )
        error: Exception | None = None
        try:
            self._engine.check_idle()
            if self._scaled:
                raise ValueError(
                    "the state was bound with grad_scaler; expected none: with it the error "
                    "feedback follows the scale by itself"
                )
            if not 0 < float(factor) < math.inf:
                raise ValueError(f"factor is {factor}; expected a positive finite number")
        except Exception as found:  # whatever it is: the other ranks must learn of it
            error = found
        call = "State.rescale_(factor)"
        ranks = gather(str(factor), error, self._group, call=call, wait=WAIT, device=self._device)
        equal("factor", ranks)
        self._engine.rescale(float(factor))
        return self

    def _steps(self) -> int:
        return 0 if self._engine is None else self._engine.steps

    def reset_metrics(self) -> None:
        """Sets the sums of `metrics` to zero; the error feedback stays."""
        if self._engine is not None:
            self._engine.reset_metrics()

    def _ensure_engine(self, device: torch.device) -> _C.Exchange:
        """The engine; made at the first bucket where nobody bound the state before."""
        if self._engine is None:
            group = self._group if self._group is not None else default_group()
            agree(
                self.config,
                [],
                self._unbound_error(group),
                group,
                call="the first bucket of a State that is not bound",
                wait=timeout_of(group),
                device=device,
            )
            self._go_on(group, device, [])
        assert self._engine is not None
        return self._engine

    def _unbound_error(self, group: dist.ProcessGroup) -> Exception | None:
        """Why the first bucket cannot be served before `bind`."""
        if self.config.adaptive:
            return ValueError(
                "adaptive is True for a State that is not bound; expected state.bind(ddp) before "
                "the first backward pass"
            )
        if self.config.ratios:
            return ValueError(
                f"ratios is {self.config.ratios}, and the State is not bound: its parameters have "
                "no names that a pattern could match; expected state.bind(ddp), or register(ddp), "
                "before the first step"
            )
        return None if self._group is not None else ambiguous(group)

    def _go_on(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        named: Sequence[tuple[str, torch.Tensor]],
        may_be_unused: bool = True,
        loss_scale: torch.Tensor | None = None,
    ) -> None:
        """Stops the engine, if there is one, and goes on over ``group``. A collective."""
        mine = self._stand()
        ranks: list[_Stand] = [mine] * group.size()
        with current(device):
            dist.all_gather_object(ranks, mine, group=group)
        together = all(rank.is_with(ranks[0]) for rank in ranks) and not ranks[0].failed
        moved = mine.group not in (None, _members(group))
        self._group = group
        self._transport = transport_of(group, device)
        self._device = device
        engine = self._engine
        if engine is None:
            engine = _C.Exchange(self.config.native(), group)
        if named:
            names = [name for name, _ in named]
            ratios = [self.config.ratio_of(name) for name in names]
            engine.bind([tensor for _, tensor in named], names, may_be_unused, ratios)
        engine.set_loss_scale(loss_scale)
        engine.resume(
            group,
            comm_groups_for(group, self._transport, ranks[0].token),
            max((step for rank in ranks for step in rank.exchanges), default=0),
            moved or not together,
        )
        self._engine = engine
        self._device = device
        self._scaled = loss_scale is not None

    def _stand(self) -> "_Stand":
        token = uuid.uuid4().hex
        if self._engine is None:
            return _Stand(token, (), (), False, None)
        self._engine.stop()
        exchanges, started, failed = self._engine.standing()
        assert self._group is not None
        return _Stand(token, tuple(exchanges), tuple(started), failed, _members(self._group))

    def __getstate__(self) -> dict[str, Any]:
        if self._group is not None and self._engine is None:
            raise TypeError(
                "a State with an explicit process_group cannot be pickled; leave process_group out "
                "and bind(ddp) in the process that uses it"
            )
        if self._engine is not None:
            warnings.warn(
                "arc_topk: a copy of this State is its configuration only; the error feedback of "
                f"{self._engine.metrics()['steps']} steps is not in it, and training that goes on "
                "from the copy begins with none. Use state.state_dict() or state.save(folder), or "
                "keep this State and bind() it to the new model",
                stacklevel=2,
            )
        return {"config": self.config, "pending": self._pending}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["config"])  # type: ignore[misc]
        self._pending = state["pending"]


@dataclass(frozen=True)
class _Stand:
    """Where a rank stands when it is bound."""

    token: str
    exchanges: tuple[int, ...]  # a parameter each
    started: tuple[bool, ...]  # EF21, EF21M: has an estimate
    failed: bool
    group: tuple[int, ...] | None  # whose ranks it has averaged over so far

    def is_with(self, other: "_Stand") -> bool:
        """Whether both have done the same so far."""
        return (self.exchanges, self.started, self.failed, self.group) == (
            other.exchanges,
            other.started,
            other.failed,
            other.group,
        )


def _members(group: dist.ProcessGroup) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(group))


def bind_together(
    state: State | None,
    ddp: DistributedDataParallel,
    error: Exception | None,
    call: str,
    grad_scaler: torch.amp.GradScaler | None,
) -> State:
    """Compares the ranks, all of them or none; then gives the state its names, group and engine.

    ``call``: what the user has called, for messages.
    """
    # Frozen ones have a place too: they may have been trained before, or be later.
    every = [
        (name, parameter)
        for name, parameter in ddp.module.named_parameters()
        if name not in ddp.parameters_to_ignore
    ]
    named = [(name, parameter) for name, parameter in every if parameter.requires_grad]
    loaded: Loaded | None = None
    loss_scale: torch.Tensor | None = None
    try:
        loss_scale = scale_of(grad_scaler, ddp.device)
        error = error or unservable_parameter(ddp, named)
        if error is None and state is not None:
            state.config.check_names([name for name, _ in every])
            error = _unbindable(state, ddp, every) or unadaptable(state.config, ddp, grad_scaler)
            if error is None and state._pending is not None:
                holder = Holder("State", state.config, ddp.process_group, ddp.device, every)
                loaded = load(holder, *state._pending)
    except Exception as found:  # whatever it is: the other ranks must learn of it
        error = found
    group, device = ddp.process_group, ddp.device
    wait = timeout_of(group)
    if state is None or state._engine is None:  # a used one may come out of a step that failed
        wait = min(wait, WAIT)
    config = state.config if state else None
    agree(
        config,
        describe_tensors(every),
        error,
        group,
        call=call,
        wait=wait,
        device=device,
        facts={"grad_scaler": describe_scaler(loss_scale)} | (loaded.facts if loaded else {}),
    )
    assert state is not None  # else there was an error
    # With these DDP throws away what parameters get that no rank has used.
    may_be_unused = ddp.find_unused_parameters or ddp.static_graph
    state._go_on(group, device, every, may_be_unused, loss_scale)
    state._every = [(name, _shape_of(parameter)) for name, parameter in every]
    if loaded is not None:
        assert state._engine is not None
        loaded.into(state._engine)
        state._pending = None
    if loss_scale is not None:
        assert grad_scaler is not None
        watch(grad_scaler, loss_scale)
    return state


def _shape_of(parameter: torch.Tensor) -> torch.Tensor:
    like = torch.empty_like(parameter, device="meta")
    return like.requires_grad_(parameter.requires_grad)


def _unbindable(
    state: State, ddp: DistributedDataParallel, named: Sequence[tuple[str, torch.Tensor]]
) -> Exception | None:
    """Why a state cannot go on with ``ddp``, if it cannot."""
    if state._group is None:
        return None
    if state._engine is None:
        told, its = _members(state._group), _members(ddp.process_group)
        if told != its:
            return ValueError(
                f"the State was made with a process_group of the ranks {told}, ddp's has {its}; "
                "expected the same: leave process_group out"
            )
        return None
    before, now = state._group.size(), ddp.process_group.size()
    if before != now:
        return ValueError(
            f"the state was used with {before} ranks, ddp's process group has {now}; expected as "
            "many: make a new State for another number of ranks"
        )
    try:
        state._engine.check_bind([p for _, p in named], [name for name, _ in named])
    except ValueError as error:
        return error
    return None
