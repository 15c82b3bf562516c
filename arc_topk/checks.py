"""What of a DDP and of its parameters can be served."""

from __future__ import annotations

import torch
from torch.nn.parallel import DistributedDataParallel

from arc_topk.servable import on_two_devices, unservable


def ddp_in(model: object) -> DistributedDataParallel:
    """The DDP that ``model`` is, or that it wraps: torch.compile's module, Lightning Fabric's.

    Raises:
        TypeError: there is none in it, or more than one.
    """
    if isinstance(model, DistributedDataParallel):
        return model
    inside = (
        [(n, m) for n, m in model.named_modules() if isinstance(m, DistributedDataParallel)]
        if isinstance(model, torch.nn.Module)
        else []
    )
    if len(inside) == 1:
        return inside[0][1]
    what = f"ddp is a {type(model).__name__}"
    if inside:
        names = ", ".join(repr(name) for name, _ in inside)
        raise TypeError(f"{what} with {len(inside)} DDP instances in it ({names}); expected one")
    raise TypeError(
        f"{what} with no DDP instance in it; expected "
        "torch.nn.parallel.DistributedDataParallel(model), or a module that wraps it"
    )


def check_hookable(ddp: DistributedDataParallel) -> None:
    """Raises ValueError for a DDP that a native hook cannot be registered on."""
    if ddp.mixed_precision is not None:
        raise ValueError(
            "ddp was made with mixed_precision, which registers a hook of its own; "
            "use torch.autocast, or a module in bfloat16, instead"
        )
    if hook := hook_of(ddp):
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


def hook_of(ddp: DistributedDataParallel) -> str:
    """The name of the reducer's hook, "" if it has none.

    A deep copy of a DDP lists its hooks, but has none of them; one that is built in is not listed.
    """
    if ddp.logger is None:
        hooks = [hook for hook, _ in ddp._comm_hooks]
        return str(getattr(hooks[0], "__qualname__", hooks[0])) if hooks else ""
    data: dict[str, object] = ddp._get_ddp_logging_data()  # type: ignore[no-untyped-call]
    return str(data.get("comm_hook") or "")


def unservable_parameter(
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
        if parameter.device != named[0][1].device:
            return on_two_devices(f"parameter '{name}'", parameter, named[0][1])
        error = unservable(f"parameter '{name}'", parameter)
        if error is not None:
            return error
    return None
