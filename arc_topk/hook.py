"""ARC-Top-K as a DDP communication hook: `register`, or `State` with `arc_topk_hook`."""

import datetime
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from arc_topk import _C
from arc_topk.agreement import agree, describe_tensors
from arc_topk.config import Config
from arc_topk.device import unservable
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
        self.config = _config(config, fields)
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
        _bind(self, ddp, None)
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
        self._engine = _C.Exchange(self.config.native(), group, _lane_group(group, device))
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


def register(ddp: DistributedDataParallel, config: Config | None = None, **fields: Any) -> State:
    """Registers compression on ``ddp``: its gradients are averaged by it from the next backward on.

    The native form: the hook is C++ and never takes the GIL. A collective: call it on every rank,
    after wrapping the model and before the first backward pass::

        ddp = DistributedDataParallel(model)
        state = arc_topk.register(ddp, ratio=0.1)

    Args:
        ddp: the wrapped model.
        config: how gradients are averaged; or give its fields as keywords.
        **fields: fields of `Config`, instead of ``config``.

    Returns:
        The state: `State.plan` shows what is compressed, `State.metrics` what it costs.

    Raises:
        TypeError: ``ddp`` is not a DistributedDataParallel, or a field has a wrong type.
        ValueError: a field's value is wrong, ``ddp`` cannot be served (it has a hook already, mixed
            precision, the Python reducer, an optimizer in backward, sparse or complex parameters),
            or ranks differ: on every rank, whichever rank it happened on.
    """
    state: State | None = None
    error: Exception | None = None
    try:
        state = State(config, **fields)
        _check_hookable(ddp)
    except (TypeError, ValueError) as found:
        error = found  # shared with the other ranks by _bind(), which raises it
    if not isinstance(ddp, DistributedDataParallel):
        raise _not_ddp(ddp)
    state = _bind(state, ddp, error)
    engine = state._engine
    assert engine is not None  # _bind() has made it
    if ddp.logger is not None:
        ddp.logger._set_comm_hook_name(arc_topk_hook.__qualname__)
    ddp._comm_hooks.append((arc_topk_hook, state))
    _C.register_comm_hook(ddp.reducer, engine)
    return state


def arc_topk_hook(state: State, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The standard form, for ``ddp.register_comm_hook(state, arc_topk_hook)``.

    The same engine as `register`, bit for bit; each bucket takes the GIL twice for a moment.

    Args:
        state: see `State`.
        bucket: DDP's.

    Returns:
        A future of the averaged bucket: a dense 1-D tensor of the bucket's numel and dtype.

    Raises:
        ValueError: sparse or complex gradients, or a dtype other than float32, float64, bfloat16
            and float16; or, at the first bucket of a state that was not bound, ranks differ.
    """
    future = state._ensure_engine(bucket.buffer().device).start(bucket)
    averaged: torch.futures.Future[torch.Tensor] = future.then(_tensor_of)
    return averaged


def _tensor_of(future: torch.futures.Future[Any]) -> torch.Tensor:
    value = future.value()
    tensor: torch.Tensor = value[0] if isinstance(value, list) else value
    return tensor


def _config(config: Config | None, fields: dict[str, Any]) -> Config:
    if config is None:
        return Config(**fields)
    if fields:
        raise TypeError(f"give either config or its fields, not both; got {sorted(fields)} as well")
    if not isinstance(config, Config):
        raise TypeError(f"config is {config!r} ({type(config).__name__}); expected arc_topk.Config")
    return config


def _bind(state: State | None, ddp: DistributedDataParallel, error: Exception | None) -> State:
    """Compares the ranks, all of them or none; then gives the state its names, group and engine."""
    if not isinstance(ddp, DistributedDataParallel):
        raise _not_ddp(ddp)
    named = [
        (name, parameter)
        for name, parameter in ddp.module.named_parameters()
        if parameter.requires_grad and name not in ddp.parameters_to_ignore
    ]
    error = error or _unservable(ddp, named)
    agree(state.config if state else None, describe_tensors(named), error, ddp.process_group)
    assert state is not None  # else there was an error
    state._named = named
    engine = state._engine
    if engine is None:
        engine = state._connect(ddp.process_group, ddp.device)
    for name, parameter in named:
        engine.set_name(parameter, name)
    return state


def _not_ddp(ddp: object) -> TypeError:
    return TypeError(
        f"ddp is a {type(ddp).__name__}; expected torch.nn.parallel.DistributedDataParallel"
    )


def _check_hookable(ddp: DistributedDataParallel) -> None:
    """Raises ValueError for a DDP that a native hook cannot be registered on."""
    if not isinstance(ddp, DistributedDataParallel):
        raise _not_ddp(ddp)
    if ddp.mixed_precision is not None:
        raise ValueError(
            "ddp was made with mixed_precision, which registers a hook of its own; "
            "use torch.autocast, or a module in bfloat16, instead"
        )
    if ddp._comm_hooks:
        hook = getattr(ddp._comm_hooks[0][0], "__qualname__", ddp._comm_hooks[0][0])
        raise ValueError(f"ddp has a communication hook already ({hook}); DDP takes only one")
    if ddp._use_python_reducer:
        raise ValueError(
            "ddp uses the Python reducer (torch._dynamo.config.optimize_ddp = 'python_reducer'), "
            "which takes no native hook; expected the default reducer"
        )
    if any(hasattr(p, "_in_backward_optimizers") for p in ddp.parameters()):
        raise ValueError(
            "an optimizer runs in ddp's backward (_apply_optimizer_in_backward), before gradients "
            "are averaged; step the optimizer after backward instead"
        )


def _unservable(
    ddp: DistributedDataParallel, named: list[tuple[str, torch.Tensor]]
) -> ValueError | None:
    """What in the model's parameters cannot be served, if anything."""
    for name, module in ddp.module.named_modules():
        if isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag) and module.sparse:
            return ValueError(
                f"module '{name}' has sparse gradients; expected dense ones: make it with "
                "sparse=False"
            )
    for name, parameter in named:
        error = unservable(f"parameter '{name}'", parameter.device)
        if error is not None:
            return error
        if parameter.is_complex():
            return ValueError(
                f"parameter '{name}' is {parameter.dtype}; expected a real dtype: keep it as "
                "torch.view_as_real(...)"
            )
        if parameter.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            return ValueError(
                f"parameter '{name}' is {parameter.dtype}; expected float32, float64, bfloat16 or "
                "float16"
            )
    return None


def _lane_group(group: dist.ProcessGroup, device: torch.device) -> dist.ProcessGroup | None:
    """A Gloo group of the same ranks and timeout, for the engine's collectives alone.

    None where collectives only queue themselves on the GPU's stream (NCCL): then there is nobody
    to wait for them, and the engine issues them on ``group`` itself, in the order of the buckets.
    """
    kind = torch.device(device.type)
    timeout: datetime.timedelta | None = None
    if kind in group._device_types:
        backend = group._get_backend(kind)
        if backend.name() == "nccl":
            return None
        timeout = backend.options._timeout
    lane = dist.new_group(
        dist.get_process_group_ranks(group),
        timeout=timeout,
        backend="gloo",
        use_local_synchronization=True,
        group_desc="arc_topk",
    )
    assert isinstance(lane, dist.ProcessGroup)
    return lane
