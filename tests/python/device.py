"""The device that the engine's tests run on: what ARC_TOPK_TEST_DEVICE names, else the CPU.

A module whose tests hand tensors to the engine says so, as a whole::

    pytestmark = pytest.mark.device

`make gpu-check` runs those modules with ARC_TOPK_TEST_DEVICE=cuda. Only what the engine is given is
on DEVICE: gradients are made, results compared and oracles run on the CPU, so that both devices are
asked for the same. Nothing here touches CUDA before a test does: ranks are forked.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

import arc_topk

DEVICE = os.environ.get("ARC_TOPK_TEST_DEVICE", "cpu")


def why_unusable() -> str | None:
    """Why no test can run on DEVICE, if none can."""
    if DEVICE not in ("cpu", "cuda"):
        return f"ARC_TOPK_TEST_DEVICE is {DEVICE!r}; expected cpu or cuda"
    if DEVICE == "cuda" and not torch.cuda.is_available():
        return "ARC_TOPK_TEST_DEVICE is cuda, but torch finds no GPU"
    if DEVICE == "cuda" and arc_topk.build_info()["cuda"] is None:
        return "ARC_TOPK_TEST_DEVICE is cuda, but this build has no CUDA kernels"
    return None


def copy_to(device: str, tensors: Iterable[Tensor | None]) -> list[Any]:
    """Copies, strides and all. To the CPU: waits until a GPU has made what is copied."""
    return [None if t is None else t.detach().to(device, copy=True) for t in tensors]
