"""Which tensors this build serves."""

from __future__ import annotations

import torch

from arc_topk import _C

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def unservable(what: str, tensor: torch.Tensor) -> ValueError | None:
    """Why gradients of this tensor's layout, dtype and device cannot be served, if they cannot."""
    if tensor.layout != torch.strided:
        return ValueError(f"{what} is sparse ({tensor.layout}); expected a dense tensor")
    if tensor.is_complex():
        return ValueError(
            f"{what} is {tensor.dtype}; expected a real dtype: keep it as torch.view_as_real(...)"
        )
    if tensor.dtype not in DTYPES:
        return ValueError(
            f"{what} is {tensor.dtype}; expected float32, float64, bfloat16 or float16"
        )
    return _unservable_device(what, tensor.device)


def _unservable_device(what: str, device: torch.device) -> ValueError | None:
    has_cuda = _C.build_info()["cuda"] is not None
    served = ("cpu", "cuda") if has_cuda else ("cpu",)
    if device.type == "cuda" and has_cuda:
        index = torch.cuda.current_device() if device.index is None else device.index
        why = _C.why_unusable(index)
        return (
            ValueError(f"{what} is on a GPU that cannot be used, '{device}': {why}")
            if why
            else None
        )
    if device.type in served:
        return None
    reason = "" if has_cuda else ": this build has no CUDA kernels, it was made without nvcc"
    return ValueError(
        f"{what} is on device '{device}'; expected {' or '.join(map(repr, served))}{reason}"
    )


def on_two_devices(what: str, tensor: torch.Tensor, first: torch.Tensor) -> ValueError:
    """The error for tensors that are not all on one device."""
    return ValueError(
        f"{what} is on device '{tensor.device}', the first on '{first.device}'; expected all on "
        "one device"
    )
