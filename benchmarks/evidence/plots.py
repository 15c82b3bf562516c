"""Loss against bytes, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def draw(points: Sequence[tuple[str, float, float]], path: Path, title: str, unit: str) -> None:
    """One line a method.

    Args:
        points: method, bytes as a share of dense's, mean loss.
        path: of the PNG.
        title: above it.
        unit: of the loss.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5))
    axes.set_prop_cycle(color=plt.get_cmap("tab20").colors)  # of ten, two methods would share some
    for name in dict.fromkeys(name for name, _, _ in points):
        own = sorted((share, loss) for other, share, loss in points if other == name)
        axes.plot(*zip(*own, strict=True), marker="o", markersize=4, label=name)
    axes.set(xlabel="bytes a step, share of dense float32", ylabel=unit, xscale="log")
    axes.set_title(title, fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
