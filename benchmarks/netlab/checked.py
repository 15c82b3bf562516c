"""The network as it was asked for: measured before anything else is."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from netlab.namespace import LabError
from netlab.network import Network
from netlab.units import rate_text, time_text

PORT = 29400
# Headers take 3 to 5 %; a queue that fills and drains, and a busy machine, some more.
LEAST_SHARE = 0.85
SLACK = 0.002  # seconds of a round trip beyond two delays: a busy machine again


@dataclass(frozen=True)
class Link:
    """What one rank has to another.

    Attributes:
        rate: payload bits a second, over one TCP connection.
        round_trip: seconds.
    """

    rate: float
    round_trip: float


def measure(network: Network) -> Link:
    """From rank 0 to rank 1, both otherwise idle."""
    script = str(Path(__file__).with_name("probe.py"))
    address = [network.address(1), str(PORT)]
    far = network.ranks[1].command(sys.executable, script, "serve", *address)
    with subprocess.Popen(far, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        server.stdout.readline()
        try:
            found = json.loads(network.ranks[0].run(sys.executable, script, "measure", *address))
        finally:
            server.kill()  # which waits for a connection that may never come
    return Link(found["rate"], found["round_trip"])


def check(network: Network, link: Link) -> None:
    """Whether the link is the one that was asked for.

    Raises:
        LabError: it is slower or faster, or later or sooner, and says by how much.
    """
    if network.rate is not None and not LEAST_SHARE <= link.rate / network.rate <= 1.02:
        raise LabError(
            f"a link of {rate_text(network.rate)} gives {rate_text(link.rate)}; expected "
            f"{100 * LEAST_SHARE:.0f} to 102 % of it: is the machine busy, or too slow for that "
            "rate? --any-rate goes on with what there is"
        )
    late = link.round_trip - 2 * network.delay
    if not -1e-4 <= late <= max(SLACK, 0.25 * network.delay):
        raise LabError(
            f"a delay of {time_text(network.delay)} one way gives a round trip of "
            f"{time_text(link.round_trip)}; expected {time_text(2 * network.delay)}: is the "
            "machine busy? --any-rate goes on with what there is"
        )


def describe(network: Network, link: Link) -> str:
    """One line for tables and logs."""
    rate = "without a limit" if network.rate is None else f"of {rate_text(network.rate)}"
    text = f"{len(network.ranks)} ranks, links {rate} (measured {rate_text(link.rate)})"
    delay = f", round trip {time_text(link.round_trip)}"
    if network.delayed_by == "relay":
        delay += ", delayed by a relay in user space"
    return text + delay
