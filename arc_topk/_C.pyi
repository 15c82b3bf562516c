"""The compiled engine (csrc/). Used through `arc_topk.register`, `State`, `GradientExchange`."""

from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import GradBucket, Reducer

class Config:
    """`arc_topk.Config` with every default filled in. Raises ValueError for an unknown name."""

    def __init__(
        self,
        *,
        compressor: str,
        feedback: str,
        ratio: float,
        sketch_dim: int,
        row_width: int | None,
        eta: float,
        start_step: int,
        wire_dtype: torch.dtype | None,
        state_dtype: torch.dtype | None,
        seed: int,
    ) -> None: ...

    compress_without_gain: bool
    """For tests alone: compress where plain averaging would send fewer bytes, as at ratio 1."""

class Exchange:
    """The engine of one list of parameters: its error feedback and the thread of its collectives.

    Args:
        config: how gradients are averaged.
        group: whose ranks are averaged; plain averaging and `run` use it themselves.
        lane_group: the same ranks, used by nobody else but the engine's thread; None: collectives
            of ``group`` only queue themselves on a GPU's stream, and no thread is needed.
    """

    def __init__(
        self,
        config: Config,
        group: dist.ProcessGroup,
        lane_group: dist.ProcessGroup | None = None,
    ) -> None: ...
    def start(self, bucket: GradBucket) -> torch.futures.Future[Any]:
        """Begins a bucket's exchange. The future holds a tensor, or a list of one.

        Raises ValueError for sparse or complex gradients and unknown dtypes.
        """

    def run(self, buffer: torch.Tensor, parameters: list[torch.Tensor]) -> torch.Tensor:
        """Exchanges ``buffer`` (1-D: the gradients of ``parameters``, one after the other) at once.

        Returns ``buffer`` or a 1-D tensor of the engine's, valid until the next call. Raises
        RuntimeError where a collective fails.
        """

    def set_name(self, parameter: torch.Tensor, name: str) -> None:
        """The name that errors give the parameter."""

    def metrics(self) -> dict[str, Any]: ...
    def reset_metrics(self) -> None: ...

def register_comm_hook(reducer: Reducer, exchange: Exchange) -> None:
    """Registers the native hook on a DDP reducer. Once per reducer, before its first backward."""

def describe(
    config: Config,
    sizes: torch.Size,
    strides: tuple[int, ...],
    dtype: torch.dtype,
    world_size: int,
) -> tuple[int, int, int, int, int, int, str]:
    """What is done with one tensor: m, n, K (0: dense), wire, dense and state bytes, why dense."""

def cpu_isa() -> str:
    """The instruction set the CPU kernels run with: "baseline", "avx2" or "avx512"."""

def build_info() -> dict[str, Any]:
    """`arc_topk.build_info` without "version" and "cpu_isa"."""
