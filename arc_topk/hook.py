"""ARC-Top-K as a DDP communication hook: `register`, or `State` with `arc_topk_hook`."""

from typing import Any

import torch
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from arc_topk import _C
from arc_topk.checks import check_hookable, not_ddp
from arc_topk.config import Config
from arc_topk.state import State, bind_together


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
        check_hookable(ddp)
    except (TypeError, ValueError) as found:
        error = found  # shared with the other ranks by bind_together(), which raises it
    if not isinstance(ddp, DistributedDataParallel):
        raise not_ddp(ddp)
    state = bind_together(state, ddp, error)
    engine = state._engine
    assert engine is not None  # bind_together() has made it
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
