"""A switch in user space that keeps every frame back for a while: where the kernel has no netem.

``python relay.py SECONDS INTERFACE PID...`` makes a TAP device in the network namespace of each
process, says "ready", and then hands frames from one to the others until its input ends. It costs
processor time by the frame: what is measured with it stands beside that label.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import select
import struct
import sys
import time

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
CLONE_NEWNET = 0x40000000
LARGEST_FRAME = 1 << 17
GROUP_BIT = 1  # of a MAC address's first byte: for many


def tap_in(pid: int, interface: str) -> int:
    """The file of a TAP device in a process's network namespace; this process is then in there."""
    namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")
    os.close(namespace)
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH", interface.encode(), IFF_TAP | IFF_NO_PI))
    return device


def relay(delay: float, ports: list[int]) -> None:
    """Hands on frames until standard input ends."""
    port_of: dict[bytes, int] = {}  # by MAC address, as they are seen
    waiting: list[tuple[float, int, int, bytes]] = []
    poll = select.poll()
    for descriptor in (sys.stdin.fileno(), *ports):
        poll.register(descriptor, select.POLLIN)
    count = 0
    while True:
        wait = None if not waiting else max(0.0, 1e3 * (waiting[0][0] - time.monotonic()))
        for port, _ in poll.poll(wait):
            if port == sys.stdin.fileno():
                return
            frame = os.read(port, LARGEST_FRAME)
            to, port_of[frame[6:12]] = frame[:6], port
            known = None if to[0] & GROUP_BIT else port_of.get(to)
            due = time.monotonic() + delay
            for out in ports if known is None else [known]:
                if out != port:
                    heapq.heappush(waiting, (due, count, out, frame))
                    count += 1
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, _, out, frame = heapq.heappop(waiting)
            try:
                os.write(out, frame)
            except (BlockingIOError, OSError):
                continue  # a full queue, or an interface that is down, drops: TCP sends again


def main() -> None:
    """Runs the command line."""
    delay, interface, *pids = sys.argv[1:]
    ports = [tap_in(int(pid), interface) for pid in pids]
    print("ready", flush=True)
    relay(float(delay), ports)


if __name__ == "__main__":
    main()
