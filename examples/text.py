"""Real text that every machine has: the source files of Python's standard library.

The order of all windows of the training text follows from (seed, epoch) alone, so the place in the
data is one number, the same on all ranks, and a resumed run goes on exactly where it stopped.
"""

from __future__ import annotations

import functools
import random
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

VALIDATION_SHARE = 0.1
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


def standard_library() -> bytes:
    """All source files of this Python's standard library, in one fixed shuffled order.

    Shuffled, because the last tenth becomes the validation text: in alphabetical order it would be
    the XML parsers.

    Raises:
        FileNotFoundError: this Python was installed without its sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(f for f in root.rglob("*.py") if not SKIPPED & set(f.relative_to(root).parts))
    if not files:
        raise FileNotFoundError(f"no Python source files under {root}: pass a text by --data FILE")
    random.Random(0).shuffle(files)
    return b"\n".join(f.read_bytes() for f in files)


@functools.cache
def load(path: Path | None) -> tuple[Tensor, Tensor]:
    """Reads the text and splits it; several runs in one process read it once.

    Args:
        path: any file; None means the standard library.

    Returns:
        The training text and the validation text, uint8 tensors of one dimension.
    """
    text = standard_library() if path is None else path.read_bytes()
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    cut = len(data) - int(VALIDATION_SHARE * len(data))
    return data[:cut], data[cut:]


class Windows:
    """Shuffled windows of ``context + 1`` bytes, dealt out to the ranks in turn.

    Args:
        text: uint8 tensor of one dimension.
        context: bytes the model reads; a window has one more, the last target.
        batch: windows a rank gets at each step.
        rank: this rank.
        ranks: number of ranks.
        seed: of the shuffling.
        position: windows that all ranks together have consumed so far.

    Raises:
        ValueError: the text has fewer windows than one step needs.
    """

    def __init__(
        self,
        text: Tensor,
        context: int,
        batch: int,
        rank: int,
        ranks: int,
        seed: int,
        position: int = 0,
    ) -> None:
        self.windows = len(text) // (context + 1)
        if self.windows < batch * ranks:
            raise ValueError(
                f"the text has {self.windows} windows of {context + 1} bytes, but one step of "
                f"{ranks} ranks needs {batch * ranks}: choose a longer text by --data, or a "
                "smaller --batch or --context"
            )
        self.text = text[: self.windows * (context + 1)].view(self.windows, context + 1)
        self.batch, self.rank, self.ranks, self.seed = batch, rank, ranks, seed
        self.position = position
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def next(self) -> Tensor:
        """This rank's next batch, int64, shape (batch, context + 1)."""
        first = self.position + self.rank * self.batch
        self.position += self.ranks * self.batch
        rows = [self._row(first + k) for k in range(self.batch)]
        return self.text[rows].long()

    def _row(self, position: int) -> int:
        epoch, place = divmod(position, self.windows)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = torch.randperm(self.windows, generator=generator)
            self._epoch = epoch
        return int(self._order[place])
