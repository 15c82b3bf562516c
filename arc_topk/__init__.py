"""ARC-Top-K gradient compression for PyTorch's DistributedDataParallel."""

from arc_topk._build import build_info, check_torch

__version__ = "0.1.0"

check_torch()

# Only now: loading the compiled module next to another torch crashes.
from arc_topk.advice import Advice, advise  # noqa: E402
from arc_topk.config import Config  # noqa: E402
from arc_topk.exchange import GradientExchange  # noqa: E402
from arc_topk.hook import arc_topk_hook, register  # noqa: E402
from arc_topk.plan import Plan, PlanRow  # noqa: E402
from arc_topk.state import State  # noqa: E402

__all__ = [
    "Advice",
    "Config",
    "GradientExchange",
    "Plan",
    "PlanRow",
    "State",
    "advise",
    "arc_topk_hook",
    "build_info",
    "register",
]
