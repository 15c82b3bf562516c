"""A few steps of every compressor on small shapes, with one NCCL rank: for compute-sanitizer."""

from __future__ import annotations

import gc
import tempfile

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import arc_topk


def steps(
    compressor: str, feedback: str, dtype: torch.dtype, wire: torch.dtype | None = None
) -> None:
    """Four steps of a model of odd sizes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(33, 70), nn.Linear(70, 257), nn.Linear(257, 5)).to(
        "cuda", dtype
    )
    ddp = DistributedDataParallel(model, device_ids=[0])
    arc_topk.register(
        ddp, compressor=compressor, feedback=feedback, ratio=0.2, wire_dtype=wire or dtype
    )
    for _ in range(4):
        ddp(torch.randn(8, 33, device="cuda", dtype=dtype)).square().sum().backward()
    torch.cuda.synchronize()


def main() -> None:
    """Every compressor, and every feedback with the one that uses all kernels."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("nccl", init_method=f"file://{folder}/store", rank=0, world_size=1)
        for feedback in ("none", "ef14", "ef21", "ef21m"):
            steps("arc_topk", feedback, torch.float32)
        for compressor in ("rand_k", "top_k"):
            steps(compressor, "ef14", torch.bfloat16)
        for compressor in ("arc_topk", "low_rank"):
            steps(compressor, "ef14", torch.float32, torch.uint8)
        steps("low_rank", "ef14", torch.float32)
        gc.collect()  # DDP may not outlive its group
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
