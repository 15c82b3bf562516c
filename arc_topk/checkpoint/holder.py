"""Whose error feedback is saved and loaded, and by which ranks together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from arc_topk.agreement import agree
from arc_topk.config import Config
from arc_topk.groups import timeout_of


@dataclass(frozen=True)
class Holder:
    """Whose error feedback it is.

    Attributes:
        what: ``"State"`` or ``"GradientExchange"``, for messages.
        config: the engine's.
        group: whose ranks save and load together.
        device: where the group's collectives may put what they send.
        tensors: every parameter in the engine's order: its name, and a tensor of its shape,
            strides and gradient's dtype that requires a gradient if it is trained now.
    """

    what: str
    config: Config
    group: dist.ProcessGroup
    device: torch.device
    tensors: Sequence[tuple[str, torch.Tensor]]

    def agree(
        self, call: str, error: Exception | None, facts: Mapping[str, str] | None = None
    ) -> None:
        """All ranks go on with ``call``, or all raise: see `agreement.agree`."""
        agree(
            self.config,
            [],
            error,
            self.group,
            call=f"{self.what}.{call}",
            wait=timeout_of(self.group),
            device=self.device,
            facts=facts or {},
        )
