"""Layout: in which order the elements of a tensor lie in memory."""

from __future__ import annotations

from torch import Tensor


def memory_order(layout: Tensor) -> list[int]:
    """Dimensions from the largest stride to the smallest; equal strides keep their order."""
    strides = layout.stride()
    return sorted(range(layout.dim()), key=lambda d: -strides[d])


def flatten(tensor: Tensor, layout: Tensor) -> Tensor:
    """The elements in the order in which a dense tensor like `layout` has them in memory: [d]."""
    return tensor.permute(memory_order(layout)).flatten()


def unflatten(flat: Tensor, layout: Tensor) -> Tensor:
    """The inverse of `flatten`: a tensor of the shape and strides of `layout`."""
    order = memory_order(layout)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return flat.reshape([layout.shape[d] for d in order]).permute(inverse)
