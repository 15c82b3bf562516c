"""ARC-Top-K gradient compression for PyTorch's DistributedDataParallel."""

from arc_topk._build import check_torch

__version__ = "0.1.0"

check_torch()
