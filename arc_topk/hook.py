"""ARC-Top-K as a DDP communication hook: `register`, or `State` with `arc_topk_hook`."""

from typing import Any

import torch
from torch._C._distributed_c10d import GradBucket
from typing_extensions import Unpack

from arc_topk import _C
from arc_topk.accumulation import warn_of_accumulation
from arc_topk.checks import check_hookable, ddp_in
from arc_topk.config import Config, Fields
from arc_topk.optimizer_rules import warn_of_settings
from arc_topk.state import State, bind_together


def register(
    ddp: torch.nn.Module,
    config: Config | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    grad_scaler: torch.amp.GradScaler | None = None,
    **fields: Unpack[Fields],
) -> State:
    """Registers compression on ``ddp``: its gradients are averaged by it from the next backward on.

    The native form: the hook is C++ and never takes the GIL. A collective: call it on every rank,
    after wrapping the model; before its first backward pass or, where plain averaging went before,
    between two::

        ddp = DistributedDataParallel(model)
        state = arc_topk.register(ddp, ratio=0.1)

    Args:
        ddp: the wrapped model: a DistributedDataParallel, or a module around one as torch.compile
            and Lightning Fabric make them.
        config: how gradients are averaged; or give its fields as keywords.
        optimizer: what the gradients are for. A warning comes where its settings went badly beside
            this configuration in our trials (docs/optimizers.md), and once where several
            synchronised backward passes make one of its steps, which EF21 and EF21M cannot add up.
            Nothing else is done with it.
        grad_scaler: what scales the loss, for one optimizer. The error feedback is then of the
            unscaled gradients, whatever the scale, and what EF14 has sent in a step that the
            scaler skips is owed again. A scaler that is not enabled counts as none.
        **fields: fields of `Config`, instead of ``config``.

    Returns:
        The state: `State.plan` shows what is compressed, `State.metrics` what it costs.

    Raises:
        TypeError: there is no DistributedDataParallel in ``ddp`` or more than one; a field has a
            wrong type, or is none of `Config`'s; ``grad_scaler`` is no GradScaler.
        ValueError: a field's value is wrong, ``ddp`` cannot be served (it has a hook already, mixed
            precision, the Python reducer, an optimizer in backward, sparse or complex parameters),
            or ranks differ: on every rank, whichever rank it happened on.
        RuntimeError: a rank has not called it within a minute, or within the process group's
            time-out if that is shorter; names it. Then it may be called again.
    """
    wrapped = ddp_in(ddp)
    state: State | None = None
    error: Exception | None = None
    try:
        state = State(config, **fields)
        check_hookable(wrapped)
    except Exception as found:
        error = found  # whatever it is: bind_together() tells the other ranks, and raises it
    state = bind_together(state, wrapped, error, "register(ddp)", grad_scaler)
    engine = state._engine
    assert engine is not None  # bind_together() has made it
    _C.register_comm_hook(wrapped.reducer, engine)
    wrapped._comm_hooks[:] = [(arc_topk_hook, state)]
    if wrapped.logger is not None:
        wrapped.logger._set_comm_hook_name(arc_topk_hook.__qualname__)
    if optimizer is not None:
        warn_of_accumulation(state, optimizer)
        warn_of_settings(state.config, optimizer)
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
