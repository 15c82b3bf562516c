"""Error feedback: gradient g_i in, message X_i out, and the state that remembers the difference.

One object is one rank's state of one tensor.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor


@dataclass
class Feedback:
    """No feedback, and the frame of the others: X_i = g_i, DDP gets C.

    A step calls `prepare(g)`, then `sent(C_i)` and `received(C)`, then `output(C)`; or, where it
    does not count for this tensor, `prepare(g)` and `undo(g)`. All tensors are flat, [d]; arguments
    and results have the work type, the state its own, to which each new value is rounded once.

    Attributes:
        numel: d.
        work: float32 or float64.
        state: type of what is kept.
        eta: momentum of EF21M.
    """

    numel: int
    work: torch.dtype = torch.float32
    state: torch.dtype = torch.float32
    eta: float = 0.1
    _stored: Tensor = field(init=False, repr=False)

    dense_start: ClassVar[bool] = False  # whether the first compressed step is dense
    own_state: ClassVar[tuple[str, ...]] = ()  # names of what is kept of rank i
    shared_state: ClassVar[tuple[str, ...]] = ()  # names of what all ranks keep alike

    def __post_init__(self) -> None:
        for name in self.own_state + self.shared_state:
            setattr(self, name, torch.zeros(self.numel, dtype=self.state))

    def load(self, name: str) -> Tensor:
        """What is kept under this name, in the work type."""
        value: Tensor = getattr(self, name)
        return value.to(self.work)

    def store(self, name: str, value: Tensor) -> None:
        """Keeps a value under this name, rounded to the state's type."""
        setattr(self, name, value.to(self.state))

    def _store_finite(self, name: str, value: Tensor) -> Tensor:
        """Stores where finite, leaves the old value elsewhere: the state stays finite for ever."""
        rounded = value.to(self.state)
        self._stored = rounded.isfinite()
        setattr(self, name, torch.where(self._stored, rounded, getattr(self, name)))
        return rounded.to(self.work)

    def _restore(self, name: str, value: Tensor) -> None:
        """Stores where the last `_store_finite` did."""
        setattr(self, name, torch.where(self._stored, value.to(self.state), getattr(self, name)))

    def start(self, g: Tensor, mean: Tensor) -> None:
        """The dense first step: v_i = h_i = g_i, h = mean g."""

    def prepare(self, g: Tensor) -> Tensor:
        """The message X_i."""
        return g

    def sent(self, c: Tensor) -> None:
        """C_i was contributed."""

    def received(self, c: Tensor) -> None:
        """C is the mean contribution."""

    def undo(self, g: Tensor) -> None:
        """Takes back `prepare(g)`, by solving its equation for the old state."""

    def reclaim(self, c: Tensor) -> None:
        """The step was skipped, and c, sent in it, has changed nothing."""

    def output(self, c: Tensor) -> Tensor:
        """What DDP gets."""
        return c


class NoFeedback(Feedback):
    """X_i = g_i; what is not sent is lost."""


class EF14(Feedback):
    """X_i = g_i + e_i; e_i = X_i - C_i; DDP gets C.

    Between `prepare` and `sent`, e holds the message itself: e = fl(g + e). Invariant, exactly and
    element by element: C_i + e_i = X_i.
    """

    own_state = ("e",)

    def prepare(self, g: Tensor) -> Tensor:
        """e_i = g_i + e_i, the message."""
        return self._store_finite("e", self.load("e") + g)

    def sent(self, c: Tensor) -> None:
        """e_i = X_i - C_i."""
        self.store("e", self.load("e") - c)

    def undo(self, g: Tensor) -> None:
        """e_i = X_i - g_i."""
        self._restore("e", self.load("e") - g)

    def reclaim(self, c: Tensor) -> None:
        """e_i += c: owed again."""
        self._store_finite("e", self.load("e") + c)


class EF21(Feedback):
    """X_i = g_i - h_i; h_i += C_i, h += C; DDP gets h.

    Invariant: h = 1/N sum h_i up to the rounding of the reductions.
    """

    dense_start = True
    own_state: ClassVar[tuple[str, ...]] = ("h_i",)
    shared_state = ("h",)

    def start(self, g: Tensor, mean: Tensor) -> None:
        """h_i = g_i, h = mean g."""
        self.store("h_i", g)
        self.store("h", mean)

    def prepare(self, g: Tensor) -> Tensor:
        """X_i = g_i - h_i; not stored, as it can be formed again."""
        return g - self.load("h_i")

    def sent(self, c: Tensor) -> None:
        """h_i += C_i."""
        self.store("h_i", self.load("h_i") + c)

    def received(self, c: Tensor) -> None:
        """Adds: h += C."""
        self.store("h", self.load("h") + c)

    def output(self, c: Tensor) -> Tensor:
        """DDP gets h."""
        return self.load("h")


class EF21M(EF21):
    """v_i = (1 - eta) v_i + eta g_i; X_i = v_i - h_i; h_i += C_i, h += C; DDP gets h.

    Only differences to h_i matter, so the tracker t_i = v_i - h_i is kept in place of v_i: the same
    thing with less rounding. Subtract h_i from both sides of the first equation:
    t_i = (1 - eta) t_i + eta (g_i - h_i), which is the message; then t_i -= C_i, as h_i += C_i.

    eta = 1 is EF21: the tracker's past has no weight.
    """

    own_state = ("t", "h_i")

    @property
    def v(self) -> Tensor:
        """The momentum v_i = t_i + h_i, in the work type."""
        return self.load("t") + self.load("h_i")

    def start(self, g: Tensor, mean: Tensor) -> None:
        """v_i = h_i = g_i, so t_i = 0; h = mean g."""
        super().start(g, mean)
        self.store("t", torch.zeros_like(g))

    def prepare(self, g: Tensor) -> Tensor:
        """t_i = (1 - eta) t_i + eta (g_i - h_i), the message."""
        tracker = self.load("t") * (1 - self.eta)
        return self._store_finite("t", tracker + (g - self.load("h_i")) * self.eta)

    def sent(self, c: Tensor) -> None:
        """t_i -= C_i, h_i += C_i."""
        self.store("t", self.load("t") - c)
        super().sent(c)

    def undo(self, g: Tensor) -> None:
        """t_i = (t_i - eta (g_i - h_i)) / (1 - eta), to a few units in the last place of X/(1-eta).

        eta = 1 leaves nothing of the old tracker in the new one, nor will anybody ask for it.
        """
        if self.eta < 1:
            tracker = self.load("t") - (g - self.load("h_i")) * self.eta
            self._restore("t", tracker / (1 - self.eta))


FEEDBACKS: dict[str, type[Feedback]] = {
    "none": NoFeedback,
    "ef14": EF14,
    "ef21": EF21,
    "ef21m": EF21M,
}
