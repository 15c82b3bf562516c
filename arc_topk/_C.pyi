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
        rank: int | None,
        sketch_dim: int,
        row_width: int | None,
        eta: float,
        start_step: int,
        warmup_steps: int,
        warmup: str,
        wire_dtype: torch.dtype | None,
        sketch_dtype: torch.dtype | None,
        state_dtype: torch.dtype | None,
        seed: int,
        spike_limit: float | None,
        check_every: int,
        resync_every: int | None,
        adaptive: bool,
    ) -> None: ...

    compress_without_gain: bool
    """For tests alone: compress where plain averaging would send fewer bytes, as at ratio 1."""

Parts = tuple[
    torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, bool
]
"""A parameter's error feedback: own_a, own_b, shared, of its shape; basis; EF21: started.

All on the CPU. The basis is low rank's W^T, [k, n], of the parameter's m x n matrix.
"""

class Exchange:
    """The engine of one list of parameters: its error feedback and the thread of its collectives.

    Args:
        config: how gradients are averaged.
        group: whose ranks are averaged; plain averaging and `run` use it themselves.
        own: see `resume`.
    """

    def __init__(
        self, config: Config, group: dist.ProcessGroup, own: list[dist.ProcessGroup] = ...
    ) -> None: ...
    def start(self, bucket: GradBucket) -> torch.futures.Future[Any]:
        """Begins a bucket's exchange. The future holds the bucket's buffer, or a list of it.

        Raises ValueError for sparse or complex gradients, unknown dtypes, and parameters whose
        error feedback cannot be carried over; RuntimeError where the bucket is still in the air,
        or the engine has failed or been stopped. Nothing is touched then.
        """

    def run(self, buffer: torch.Tensor, parameters: list[torch.Tensor]) -> torch.Tensor:
        """Exchanges ``buffer`` (1-D: the gradients of ``parameters``, one after the other) at once.

        Returns ``buffer`` or a 1-D tensor of the engine's, valid until the next call. Raises
        RuntimeError where a collective fails.
        """

    def check_bind(self, parameters: list[torch.Tensor], names: list[str]) -> None:
        """Raises ValueError, naming the parameter, where `bind` could not keep all state."""

    def bind(
        self,
        parameters: list[torch.Tensor],
        names: list[str],
        may_be_unused: bool,
        ratios: list[float] = ...,
    ) -> None:
        """These are the parameters from now on; state is taken over by name.

        ``ratios``: one each; none: the configuration's.
        ``may_be_unused``: a gradient of zeros on all ranks stands for none, and changes no state.
        """

    def set_loss_scale(self, scale: torch.Tensor | None) -> None:
        """Gradients and results are ``scale`` times too large from now on; read anew every step.

        ``scale``: a GradScaler's number (0-dim float32), changed in place. None: they are not.
        """

    def check_idle(self) -> None:
        """Raises RuntimeError where a bucket is in the air."""

    def rescale(self, factor: float) -> None:
        """Multiplies all error feedback. Not while a bucket is in the air."""

    def stop(self) -> None:
        """Gives up what is in the air, after a second's grace. Until `resume`, no bucket starts."""

    def standing(self) -> tuple[list[int], list[bool], bool]:
        """A parameter each: steps, and whether EF21's estimate is there; whether one has failed."""

    def resume(
        self,
        group: dist.ProcessGroup,
        own: list[dist.ProcessGroup],
        exchanges: int,
        afresh: bool,
    ) -> None:
        """Goes on over these groups, from step ``exchanges`` on.

        ``own``: the same ranks twice, used by nobody else: for first collectives and for second
        ones, with threads that wait for them. None of them: collectives of ``group`` only queue
        themselves on a GPU's stream, and no thread is needed. One: for both, bucket after bucket.
        ``afresh``: EF21 and EF21M begin with a dense step again.
        """

    def snapshot(self) -> tuple[list[tuple[str, Parts | None]], int, int]:
        """Error feedback by parameter, in the order of `bind`; steps; compressed steps.

        Copies, between two steps: RuntimeError while a bucket is in the air.
        """

    def restore(self, slots: list[Parts | None], exchanges: int, compressed: int) -> None:
        """Takes back what `snapshot` gave, a parameter each; RuntimeError as there."""

    def metrics(self) -> dict[str, Any]: ...
    def reset_metrics(self) -> None: ...
    def choice(self) -> tuple[int, list[str], list[float]] | None:
        """What ``Config.adaptive`` has chosen; None: it is off.

        The step that it was chosen in, 0 before the first choice; a form a bucket ("dense",
        "bfloat16", "compressed"); seconds from a step's first bucket to its last result with all
        buckets dense, all in bfloat16, each in what is fastest for it, and all compressed.
        """
    @property
    def steps(self) -> int:
        """``metrics()["steps"]``, without waiting for a GPU."""

def register_comm_hook(reducer: Reducer, exchange: Exchange) -> None:
    """Registers the native hook on a DDP reducer. Once per reducer, before its first backward."""

def parts_of(config: Config, compressed: bool) -> tuple[int, bool, bool]:
    """How many own parts, whether a shared one, and whether a basis a tensor has."""

def describe(
    config: Config,
    sizes: torch.Size,
    strides: tuple[int, ...],
    dtype: torch.dtype,
    world_size: int,
    ratio: float,
) -> tuple[int, int, int, int, int, int, str, int, int, torch.dtype]:
    """What is done with one tensor: m, n, K (0: dense), wire, dense and state bytes, why dense.

    Then the steps from one resync to the next (0: there is none), and the bytes of one; and what it
    travels in.
    """

def ratio_at(config: Config, ratio: float, step: int) -> float:
    """What the warm-up makes of a ratio in this step."""

def cpu_isa() -> str:
    """The instruction set the CPU kernels run with: "baseline", "avx2" or "avx512"."""

def why_unusable(device: int) -> str:
    """Why the CUDA kernels cannot run on the GPU of this index, and what to do; "" if they can."""

def build_info() -> dict[str, Any]:
    """`arc_topk.build_info` without "version" and "cpu_isa"."""
