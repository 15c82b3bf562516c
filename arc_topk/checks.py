"""What of a DDP and of its parameters can be served."""

from __future__ import annotations

import torch
from torch.nn.parallel import DistributedDataParallel

from arc_topk.device import unservable


def not_ddp(ddp: object) -> TypeError:
    """The error for what is no DDP."""
    return TypeError(
        f"ddp is a {type(ddp).__name__}; expected torch.nn.parallel.DistributedDataParallel"
    )


def check_hookable(ddp: DistributedDataParallel) -> None:
    """Raises ValueError for a DDP that a native hook cannot be registered on."""
    if not isinstance(ddp, DistributedDataParallel):
        raise not_ddp(ddp)
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
