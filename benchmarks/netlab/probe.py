"""What a link gives: run inside the lab, by the standard library alone.

- ``python probe.py serve ADDRESS PORT``: takes one connection, then ends;
- ``python probe.py measure ADDRESS PORT``: prints JSON: bits a second, seconds of a round trip.
"""

from __future__ import annotations

import json
import socket
import statistics
import sys
import time

ROUND_TRIPS = 7
WARM_UP, MEASURED = 0.5, 1.0  # seconds
BLOCK = bytes(1 << 20)


def serve(address: str, port: int) -> None:
    """Echoes single bytes; then takes all that comes, and tells its rate behind the warm-up."""
    with socket.create_server((address, port)) as server:
        print("ready", flush=True)
        connection, _ = server.accept()
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(ROUND_TRIPS):
            connection.sendall(connection.recv(1))
        buffer = bytearray(1 << 20)
        begin = since = last = time.perf_counter()
        received = 0
        while count := connection.recv_into(buffer):
            last = time.perf_counter()
            if last - begin < WARM_UP:
                since = last
            else:
                received += count
        rate = 8 * received / (last - since) if last > since else 0.0
        connection.sendall(json.dumps(rate).encode())


def measure(address: str, port: int) -> None:
    """The other end."""
    with socket.create_connection((address, port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        trips = []
        for _ in range(ROUND_TRIPS):
            begin = time.perf_counter()
            connection.sendall(b"x")
            connection.recv(1)
            trips.append(time.perf_counter() - begin)
        end = time.perf_counter() + WARM_UP + MEASURED
        while time.perf_counter() < end:
            connection.sendall(BLOCK)
        connection.shutdown(socket.SHUT_WR)
        rate = json.loads(connection.makefile().read())
    print(json.dumps({"rate": rate, "round_trip": statistics.median(trips)}))


if __name__ == "__main__":
    {"serve": serve, "measure": measure}[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
