"""Settings of an optimizer that trials found harmful beside a configuration: docs/optimizers.md."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from arc_topk.config import Config


@dataclass(frozen=True)
class Settings:
    """What a rule looks at, of one parameter group.

    Attributes:
        adaptive: it divides by a running mean of squares, as Adam does.
        momentum: beta1, or SGD's momentum; 0: none.
    """

    adaptive: bool
    momentum: float


@dataclass(frozen=True)
class Rule:
    """One row of the table in docs/optimizers.md.

    Attributes:
        harms: whether what was found harmful is there.
        found: what was measured, and what to set.
    """

    harms: Callable[[Config, Settings], bool]
    found: str


RULES = (
    Rule(
        lambda config, its: (
            its.adaptive
            and config.feedback in ("ef21", "ef21m")
            and config.compressor == "arc_topk"
        ),
        "the optimizer divides by a running mean of squares, as Adam does, beside "
        "compressor='arc_topk' with feedback='{config.feedback}': a language model ended at a loss "
        "of 2.3 with EF21M and 1.8 with EF14, each at its best settings; set feedback='ef14'",
    ),
    Rule(
        lambda config, its: (
            its.adaptive
            and its.momentum >= 0.9
            and config.feedback == "ef14"
            and config.compressor == "arc_topk"
        ),
        "beta1 is 0.9 or more beside compressor='arc_topk' with feedback='ef14', which delays too: "
        "a language model ended at a loss of 1.89 with beta1 of 0.9 and 1.75 with 0.5, each at its "
        "best learning rate; set beta1 to 0.5 or less",
    ),
)


def warn_of_settings(config: Config, optimizer: torch.optim.Optimizer) -> None:
    """Warns, once for each rule, of settings that went badly in our trials."""
    groups = [_settings_of(group) for group in optimizer.param_groups]
    for rule in RULES:
        if any(rule.harms(config, its) for its in groups):
            text = rule.found.format(config=config)
            warnings.warn(f"arc_topk: {text} (docs/optimizers.md)", stacklevel=3)


def _settings_of(group: dict[str, object]) -> Settings:
    betas = group.get("betas")
    if isinstance(betas, tuple | list) and len(betas) > 0:
        return Settings(adaptive=True, momentum=_number(betas[0]))
    return Settings(adaptive="alpha" in group, momentum=_number(group.get("momentum")))


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float | torch.Tensor) else 0.0
