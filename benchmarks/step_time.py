"""Whole steps over links of chosen rates: where compression pays, and where it does not.

N ranks on this machine, each behind a link of its own (netlab). Two kinds of backward pass:

  --replay MS   a wait in its place: DDP's buckets become ready over so many milliseconds, in which
                the processor is idle, as beside a GPU. What is measured is the exchange; every
                table says so.
  --replay 0    everything ready at once: the exchange alone.
  --train       a real forward and backward pass and an SGD step of a LLaMA-like model, all ranks on
                this machine's cores.

Before anything is timed every method of arc_topk is checked against the oracle, over these ranks.
Methods then take turns, round after round. exposed: the step beyond the replayed time (beyond the
step without averaging). bytes alone: what a ring must send over the link at the rate measured just
before. busy: bytes that left the interface, headers and all, over what it could have sent.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from llama import SIZES
from netlab.checked import check, describe
from netlab.checked import measure as measure_link
from netlab.launch import run_ranks
from netlab.namespace import LabError, become_root
from netlab.network import Network
from netlab.units import argument, rate, rate_text, seconds
from report import machine
from rich.console import Console
from step_rank import METHODS
from step_report import draw, table

EXAMPLES = """\
examples:
  python benchmarks/step_time.py --rates 1gbit --replay 100
  python benchmarks/step_time.py --rates 100mbit 1gbit 10gbit none --replay 20 200 2000 \\
      --ratios 0.2 0.1 0.01 --json grid.json --png grid.png
  python benchmarks/step_time.py --model 25m --train --rates 1gbit --methods dense arc_topk
  python benchmarks/step_time.py --rates 1gbit --delay 20ms --replay 200
"""
DEFAULT = ["dense", "bf16_hook", "arc_topk", "arc_topk_bf16", "arc_topk_uint8", "rand_k", "top_k"]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = p.add_argument
    add("--model", choices=SIZES, default="60m", help="default %(default)s")
    add("--methods", nargs="+", choices=METHODS, default=DEFAULT)
    add("--ranks", type=int, default=4, help="default %(default)s")
    add("--rates", type=argument(rate), nargs="+", default=[1e9], metavar="RATE",
        help="of the links: 100mbit, 1gbit, none (default 1gbit)")  # fmt: skip
    add("--delay", type=argument(seconds), metavar="TIME",
        help="one way, of every packet: 20ms (default: none)")  # fmt: skip
    add("--replay", type=float, nargs="+", default=[], metavar="MS", help="default 100")
    add("--train", action="store_true", help="a real backward pass")
    add("--tokens", type=int, default=128, help="of a real step, a rank (default %(default)s)")
    add("--ratios", type=float, nargs="+", default=[0.2], help="default %(default)s")
    add("--bucket-mb", type=float, nargs="+", default=[25.0],
        help="DDP's bucket_cap_mb; plain averaging with each, others with the first")  # fmt: skip
    add("--rounds", type=int, default=7, help="timed ones (default %(default)s)")
    add("--threads", type=int, default=1, help="of torch, a rank (default %(default)s)")
    add("--any-rate", action="store_true", help="go on where the link measured is another")
    add("--json", type=Path, metavar="FILE", help="settings, machine, links and every round")
    add("--png", type=Path, metavar="FILE", help="bars of where each step's time goes")
    return p


def parse() -> argparse.Namespace:
    """Arguments, checked."""
    p = parser()
    args = p.parse_args()
    for name in ("ranks", "rounds", "threads", "tokens"):
        if getattr(args, name) < 1:
            p.error(f"--{name} is {getattr(args, name)}; expected 1 or more")
    for ratio in args.ratios:
        if not 0 < ratio <= 1:
            p.error(f"--ratios has {ratio}; expected shares in (0, 1]")
    if not args.replay and not args.train:
        args.replay = [100.0]
    return args


def measure(
    args: argparse.Namespace, bits: float | None, folder: Path, console: Console
) -> dict[str, Any]:
    """All cells of one link."""
    with Network(args.ranks, bits, args.delay or 0.0) as network:
        link = measure_link(network)
        if not args.any_rate:
            check(network, link)
        label = describe(network, link)
        console.print(label)
        settings = {
            "label": label,
            "model": args.model,
            "methods": args.methods,
            "replay_s": [1e-3 * ms for ms in args.replay] + [None] * args.train,
            "ratios": args.ratios,
            "bucket_mb": args.bucket_mb,
            "rounds": args.rounds,
            "threads": args.threads,
            "tokens": args.tokens,
        }
        given, output = folder / "settings.json", folder / "rows.json"
        given.write_text(json.dumps(settings))
        script = Path(__file__).with_name("step_rank.py")
        threads = {"OMP_NUM_THREADS": str(args.threads)}
        status = run_ranks(network, [str(script), str(given), str(output)], label, threads)
        if status:
            raise LabError(f"a rank has ended with status {status}: its own words are above")
        rows = json.loads(output.read_text())
        return {
            "rate": "no limit" if bits is None else rate_text(bits),
            "measured": link.rate,
            "round_trip_s": link.round_trip,
            "label": label,
            "rows": rows,
        }


def main() -> int:
    """Runs the command line; returns the exit status."""
    args = parse()
    console = Console()
    if not console.is_terminal:
        console.width = 150  # a file has no edge to wrap at
    links: list[dict[str, Any]] = []
    status = 0
    try:
        become_root(Path(__file__), sys.argv[1:])
        with tempfile.TemporaryDirectory() as folder:
            for bits in args.rates:
                links.append(measure(args, bits, Path(folder), console))
                for shown in table(links[-1]):
                    console.print(shown)
    except LabError as error:
        console.print(f"step_time: {error}", style="red")
        status = 2
    except KeyboardInterrupt:
        status = 130
    if not links:
        return status
    if args.json:
        report = {
            "command": ["python", "benchmarks/step_time.py", *sys.argv[1:]],
            "machine": machine(),
            "links": links,
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.png:
        draw(links, args.png)
    return status


if __name__ == "__main__":
    sys.exit(main())
