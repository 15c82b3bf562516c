"""The ranks' network: a namespace and a limited link for each, one switch."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from netlab.namespace import LabError, Namespace

INTERFACE = "eth0"  # of each rank
RELAY_MTU = 65000  # few large frames: the relay costs by the frame
# A TCP window that holds what is under way, whatever rate and delay: bytes, least, first, most.
WINDOWS = "4096 262144 134217728"


class Network:
    """N namespaces that reach one another. A context manager: all is gone behind it.

    Args:
        ranks: N, 1 to 250.
        rate: of each link either way, bits a second; None: as fast as the kernel is.
        delay: of every packet from one rank to another, one way, seconds. By netem where the kernel
            has it; else by a relay in user space, which limits the way out of each rank alone.

    Attributes:
        ranks: the namespaces.
        delayed_by: "", "netem" or "relay".

    Raises:
        LabError: the machine cannot do it.
    """

    def __init__(self, ranks: int, rate: float | None = None, delay: float = 0.0) -> None:
        self.rate = rate
        self.delay = delay
        self.delayed_by = ""
        self.ranks: list[Namespace] = []
        self._stack = ExitStack()
        try:
            self._build(ranks)
        except FileNotFoundError as missing:
            self._stack.close()
            raise LabError(
                f"{missing.filename} is not installed: it is part of iproute2 (ip, tc) or "
                "util-linux (unshare, nsenter, setpriv)"
            ) from None
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    @staticmethod
    def address(rank: int) -> str:
        """Of a rank, within the lab."""
        return f"10.77.0.{rank + 1}"

    def _build(self, ranks: int) -> None:
        switch = self._namespace()
        self.ranks = [self._namespace() for _ in range(ranks)]
        if self.delay and not _has_netem(switch):
            self.delayed_by = "relay"
            self._relay()
        else:
            self.delayed_by = "netem" if self.delay else ""
            switch.run("ip", "link", "add", "switch", "up", "type", "bridge")
            for rank in range(ranks):
                self._cable(switch, rank)
        for rank, namespace in enumerate(self.ranks):
            namespace.run("ip", "address", "add", f"{self.address(rank)}/24", "dev", INTERFACE)
            namespace.run("ip", "link", "set", INTERFACE, "up")
            self._limit(namespace, INTERFACE)
            for buffers in ("tcp_rmem", "tcp_wmem"):
                namespace.run("sh", "-c", f"echo {WINDOWS} > /proc/sys/net/ipv4/{buffers}")

    def _namespace(self) -> Namespace:
        namespace = Namespace()
        self._stack.callback(namespace.close)
        return namespace

    def _cable(self, switch: Namespace, rank: int) -> None:
        """From the switch's port, which limits the way in, to the rank's interface."""
        port = f"port{rank}"
        peer = ("peer", "name", INTERFACE, "netns", str(self.ranks[rank].pid))
        switch.run("ip", "link", "add", port, "type", "veth", *peer)
        switch.run("ip", "link", "set", port, "master", "switch", "up")
        handle = self._limit(switch, port)
        if self.delay:
            milliseconds = f"{self.delay * 1e3:g}ms"
            under = ("parent", "1:1") if handle else ("root",)
            switch.run("tc", "qdisc", "add", "dev", port, *under, "netem", "delay", milliseconds,
                       "limit", "1000000")  # fmt: skip

    def _limit(self, namespace: Namespace, device: str) -> bool:
        """Whether there is a limit."""
        if self.rate is None:
            return False
        # A millisecond at once, but no less than the kernel's largest segment; a queue of 50 ms.
        burst = max(self.rate / 8e3, 128 * 1024)
        queue = max(self.rate / 8 * 0.05, 2 * burst)
        namespace.run("tc", "qdisc", "add", "dev", device, "root", "handle", "1:", "tbf",
                      "rate", f"{self.rate:.0f}bit", "burst", f"{burst:.0f}",
                      "limit", f"{queue:.0f}")  # fmt: skip
        return True

    def _relay(self) -> None:
        pids = [str(namespace.pid) for namespace in self.ranks]
        script = Path(__file__).with_name("relay.py")
        relay = subprocess.Popen(
            [sys.executable, str(script), str(self.delay), INTERFACE, *pids],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._stack.callback(_end, relay)
        assert relay.stdout is not None and relay.stderr is not None
        if relay.stdout.readline() != b"ready\n":
            said = relay.stderr.read().decode().strip().splitlines()[-1:]
            raise LabError(f"no delay without netem or a TAP device: {''.join(said)}")
        for namespace in self.ranks:
            namespace.run("ip", "link", "set", INTERFACE, "mtu", str(RELAY_MTU))


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        assert pipe is not None
        pipe.close()


def _has_netem(namespace: Namespace) -> bool:
    """Asked where nothing else is: of a loopback."""
    try:
        namespace.run("tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms")
    except LabError:
        return False
    namespace.run("tc", "qdisc", "del", "dev", "lo", "root")
    return True
