"""The spike limit: a gradient that is much longer than usual is scaled down before it is sent."""

from __future__ import annotations

import math

import torch
from torch import Tensor

WEIGHT = 0.1  # of a new norm in the running one


class SpikeLimit:
    """One rank's limit of one bucket: `factor` times its running norm.

    The running norm is the weighted mean of the norms so far, as they were after limiting, each
    weighing 1 - WEIGHT times as much as the one after it. A norm of zero (a rank that has joined)
    does not enter it, nor does one that is not finite, unless there is a limit to cut it to. There
    is no limit before there is a running norm.

    Args:
        factor: above 1.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.sum = 0.0
        self.weight = 0.0

    @property
    def limit(self) -> float:
        """The largest norm that passes."""
        return self.factor * self.sum / self.weight if self.weight > 0 else math.inf

    def scale(self, gradients: list[Tensor]) -> float:
        """What the bucket's gradients are to be multiplied with; counts them.

        Returns:
            1 where the norm is within the limit, or NaN; 0 where it is infinite, as it is where its
            square overflows the work type, and there is a limit.
        """
        squares = torch.stack([g.double().square().sum() for g in gradients]).sum()
        norm = float(squares.to(gradients[0].dtype).sqrt())
        limited = min(norm, self.limit)
        if not (norm > 0 and math.isfinite(limited)):
            return 1.0
        self.sum += WEIGHT * (limited - self.sum)
        self.weight += WEIGHT * (1 - self.weight)
        return limited / norm
