"""Which devices this build serves."""

from __future__ import annotations

import torch

from arc_topk import _C


def unservable(what: str, device: torch.device) -> ValueError | None:
    """Why a tensor of this device cannot be served, if it cannot."""
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
