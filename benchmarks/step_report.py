"""Tables and pictures of `step_time.py`."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table


def exposed(row: dict[str, Any], local: float | None) -> float:
    """Milliseconds of a step that a free exchange would not take; the median."""
    base = 1e3 * row["replay_s"] if row["replay_s"] is not None else local or 0.0
    return statistics.median(row["ms"]) - base


def alone(row: dict[str, Any], link: dict[str, Any]) -> float | None:
    """Milliseconds that the bytes take by themselves."""
    return 8e3 * row["link_bytes"] / link["measured"] if row.get("link_bytes") else None


def cells(link: dict[str, Any]) -> Iterator[tuple[float | None, float, list[dict[str, Any]]]]:
    """Replayed seconds, ratio and rows of each cell."""
    for (replay, ratio), rows in itertools.groupby(
        link["rows"], lambda row: (row["replay_s"], row["ratio"])
    ):
        yield replay, ratio, list(rows)


def local_of(rows: list[dict[str, Any]]) -> float | None:
    """Median step without averaging, of real training."""
    return next((statistics.median(r["ms"]) for r in rows if r["method"] == "local"), None)


def dense_of(rows: list[dict[str, Any]]) -> float | None:
    """The better of the plain ways: dense and bf16, at their best bucket size."""
    plain = [statistics.median(r["ms"]) for r in rows if r["method"] in ("dense", "bf16_hook")]
    return min(plain) if plain else None


def table(link: dict[str, Any]) -> Iterator[Table]:
    """A table a cell; in red where the better of dense and bf16 is faster."""
    for replay, ratio, rows in cells(link):
        kind = "a real step" if replay is None else f"backward replayed over {1e3 * replay:g} ms"
        title = f"{kind}, ratio {ratio:g}, {rows[0]['numel'] / 1e6:.1f} M parameters"
        shown = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
        shown.add_column("method")
        for column in ("ms (min-max)", "against dense", "exposed", "bytes alone", "exposed / alone",
                       "sent MB", "busy", "CPU s"):  # fmt: skip
            shown.add_column(column, justify="right")
        best = dense_of(rows)
        dense = next((statistics.median(r["ms"]) for r in rows if r["method"] == "dense"), None)
        for row in rows:
            ms = statistics.median(row["ms"])
            bare, bytes_alone = exposed(row, local_of(rows)), alone(row, link)
            sent = statistics.median(row["sent"])
            sizes = {r["bucket_mb"] for r in rows if r["method"] == row["method"]}
            suffix = f" ({row['bucket_mb']:g} MB)" if len(sizes) > 1 else ""
            plain = row["method"] in ("dense", "bf16_hook", "local")
            shown.add_row(
                row["method"] + suffix,
                f"{ms:.0f} ({min(row['ms']):.0f}-{max(row['ms']):.0f})",
                f"{100 * (ms / dense - 1):+.0f} %" if dense else "",
                f"{bare:.0f}",
                f"{bytes_alone:.0f}" if bytes_alone else "",
                f"{bare / bytes_alone:.2f}" if bytes_alone else "",
                f"{sent / 1e6:.1f}",
                f"{100 * 8e3 * sent / link['measured'] / ms:.0f} %",
                f"{statistics.median(row['cpu_ms']) / 1e3:.2f}",
                style="red" if best is not None and not plain and ms > best else None,
            )
        yield shown


def draw(links: list[dict[str, Any]], path: Path) -> None:
    """Stacked bars of each step: replayed or local, bytes alone, and what is left."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    all_cells = [(link, *cell) for link in links for cell in cells(link)]
    height = 0.3 * sum(len(rows) + 2 for *_, rows in all_cells) + 1
    figure, axes = plt.subplots(len(all_cells), 1, figsize=(9, height), squeeze=False)
    for (link, replay, ratio, rows), ax in zip(all_cells, axes[:, 0], strict=True):
        names = [f"{row['method']} {row['bucket_mb']:g} MB" for row in rows]
        local = local_of(rows)
        totals = [statistics.median(row["ms"]) for row in rows]
        bare = [max(0.0, exposed(row, local)) for row in rows]
        wire = [min(e, alone(row, link) or 0.0) for e, row in zip(bare, rows, strict=True)]
        base = [total - e for total, e in zip(totals, bare, strict=True)]
        left = [e - w for e, w in zip(bare, wire, strict=True)]
        ax.barh(names, base, color="#c8c8c8", label="backward")
        ax.barh(names, wire, left=base, color="#4878a8", label="bytes alone")
        starts = [b + w for b, w in zip(base, wire, strict=True)]
        ax.barh(names, left, left=starts, color="#d08040", label="exposed beyond them")
        ax.invert_yaxis()
        kind = "a real step" if replay is None else f"backward replayed, {1e3 * replay:g} ms"
        ax.set_title(f"{link['rate']}, {kind}, ratio {ratio:g}", fontsize=9, loc="left")
        ax.set_xlabel("ms a step")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
