"""`python -m benchmarks.netlab`: a script over N ranks, each behind a link of its own."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

if __package__ != "netlab":  # started as benchmarks.netlab: its modules name it by itself
    sys.path.insert(0, str(Path(__file__).parents[1]))

from netlab.checked import check, describe, measure
from netlab.launch import run_ranks
from netlab.namespace import LabError, become_root
from netlab.network import Network
from netlab.units import argument, rate, seconds

EXAMPLES = """\
examples:
  python -m benchmarks.netlab --ranks 4 --rate 1gbit -- examples/train_ddp.py --steps 50
  python -m benchmarks.netlab --rate 100mbit --delay 20ms -- train.py
  python -m benchmarks.netlab --ranks 2                     builds it, measures a link, ends

Scripts start as under torchrun: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set, and Gloo is
told the interface. NETLAB in the environment holds the line that describes the network. As root, or
without where the system lets users have namespaces. --delay is added to every packet, one way.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.netlab",
        description="Runs a training script or benchmark over N ranks on this machine, each in its "
        "own network namespace behind a link of a chosen rate and delay.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = p.add_argument
    add("--ranks", type=int, default=4, help="1 to 250 (default %(default)s)")
    add("--rate", type=argument(rate), metavar="RATE",
        help="of every link, either way: 100mbit, 1gbit (default: none, no limit)")  # fmt: skip
    add("--delay", type=argument(seconds), metavar="TIME",
        help="one way: 500us, 20ms (default: none)")  # fmt: skip
    add("--any-rate", action="store_true", help="go on where the link measured is another")
    add("script", nargs="*", metavar="SCRIPT", help="behind --: a script and its arguments")
    return p


def main() -> int:
    """Runs the command line; returns the exit status."""
    p = parser()
    options = p.parse_args()
    if not 1 <= options.ranks <= 250:
        p.error(f"--ranks is {options.ranks}; expected 1 to 250")
    # Both clean up; a shell that starts it in the background has had interrupts ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # cleans up, too
    try:
        become_root("benchmarks.netlab", sys.argv[1:])
        with Network(options.ranks, options.rate, options.delay or 0.0) as network:
            label = ""
            if options.ranks > 1:
                link = measure(network)
                if not options.any_rate:
                    check(network, link)
                label = describe(network, link)
                print(f"netlab: {label}", file=sys.stderr, flush=True)
            return run_ranks(network, options.script, label) if options.script else 0
    except LabError as error:
        print(f"netlab: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
