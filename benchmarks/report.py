"""What is shown of the results: tables, their legend, and the machine they depend on."""

from __future__ import annotations

import argparse
import os
import platform
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from timing import COMPUTE

import arc_topk


def median(value: dict[str, Any] | None, digits: int = 1) -> str:
    """A spread's median as text."""
    return "" if value is None else f"{value['median']:.{digits}f}"


def with_range(value: dict[str, Any] | None, digits: int = 1) -> str:
    """A spread as "median (least-largest)"."""
    if value is None:
        return ""
    return f"{median(value, digits)} ({value['min']:.{digits}f}-{value['max']:.{digits}f})"


def hook_table(rows: list[dict[str, Any]], title: str) -> Table:
    """The cost of the hook alone, for one setting of threads, feedback and ratio."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("hook")
    columns = ["ms (min-max)", *COMPUTE, "compute", "floor", "x floor (min-max)"]
    for column in [*columns, "x python", "x powersgd", "bytes"]:
        table.add_column(column, justify="right")
    for row in rows:
        phases = row.get("phases_ms", {})
        table.add_row(
            row["hook"],
            with_range(row["ms"]),
            *[f"{phases[phase]:.1f}" if phases else "" for phase in COMPUTE],
            median(row.get("compute_ms")),
            median(row.get("floor_ms")),
            with_range(row.get("over_floor"), 2),
            median(row.get("times_faster_than_python")),
            median(row.get("times_faster_than_powersgd")),
            share_of_bytes(row),
        )
    return table


def ranks_table(rows: list[dict[str, Any]], title: str) -> Table:
    """The whole exchange over several ranks, for one setting."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("hook")
    for column in ("ms (min-max)", "x DDP (min-max)", "compute", "collectives", "bytes"):
        table.add_column(column, justify="right")
    for row in rows:
        phases = row.get("phases_ms", {})
        collectives = [v for phase, v in phases.items() if phase not in COMPUTE]
        table.add_row(
            row["hook"],
            with_range(row["ms"]),
            with_range(row.get("times_faster_than_DDP"), 2),
            median(row.get("compute_ms")),
            f"{sum(collectives):.1f}" if phases else "",
            share_of_bytes(row),
        )
    return table


def share_of_bytes(row: dict[str, Any]) -> str:
    """What is handed to the collectives, relative to plain averaging."""
    return f"{100 * row['wire_bytes'] / row['dense_bytes']:.1f} %" if "wire_bytes" in row else ""


def machine() -> dict[str, Any]:
    """What the numbers depend on besides the settings."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "isa": arc_topk._C.cpu_isa(),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "arc_topk": arc_topk.__version__,
    }


def legend(args: argparse.Namespace) -> str:
    """What the columns mean, in a few lines under the tables."""
    if args.ranks > 1:
        return (
            "ms: all buckets in flight together, slowest rank, median of the rounds. x DDP: how\n"
            "many times faster than DDP's own all-reduce. compute, collectives: over buckets.\n"
            "bytes: handed to the collectives, of those of plain averaging."
        )
    return (
        "ms: from each hook call to its completed future, summed over buckets; median of rounds.\n"
        "compute: its phases without the collectives. floor: the least bytes the equations allow,\n"
        "at the bandwidth of `stream` (c += a b, as many float32 elements). x python, x powersgd:\n"
        "how many times faster than those. bytes: handed to the collectives, of those of plain\n"
        "averaging."
    )
