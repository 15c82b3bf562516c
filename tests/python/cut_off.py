"""Two ranks in network namespaces of their own, whose only link goes down in the middle of a step.

    unshare -Urn python cut_off.py BUCKET MOMENT FOLDER

prints a line of JSON a rank: rank, error, seconds. It exits with 77 where the machine allows no
namespaces.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

NAMES = ("left", "right")
NOT_HERE = 77


def ip(*words: str) -> bool:
    return subprocess.run(["ip", *words], capture_output=True).returncode == 0


def serve(rank: int, bucket: int, moment: str, folder: str) -> None:
    import torch
    import torch.distributed as dist
    from test_lost_ranks import SHORT, Harm, suffer

    while not ip("addr", "add", f"10.77.0.{rank + 1}/24", "dev", NAMES[rank]):
        time.sleep(0.05)
    ip("link", "set", "lo", "up")
    ip("link", "set", NAMES[rank], "up")
    os.environ["GLOO_SOCKET_IFNAME"] = NAMES[rank]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=SHORT
    )
    text, seconds, _ = suffer(rank, 2, Harm("cut", bucket, moment))
    # One write, the end of the line in it: the other rank has the same pipe.
    print(json.dumps([rank, text, seconds]) + "\n", end="", flush=True)
    os._exit(0)  # threads of a group that is cut off would wait for it


def main() -> None:
    bucket, moment, folder = sys.argv[1:4]
    if len(sys.argv) > 4:
        serve(int(sys.argv[4]), int(bucket), moment, folder)
    command = [sys.executable, __file__, bucket, moment, folder]
    try:
        other = subprocess.Popen(["unshare", "-n", *command, "1"])
    except FileNotFoundError:
        sys.exit(NOT_HERE)
    mine = Path("/proc/self/ns/net").readlink()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{other.pid}/ns/net").readlink() == mine and time.monotonic() < deadline:
        time.sleep(0.01)
    peer = ("peer", "name", NAMES[1], "netns", str(other.pid))
    if not ip("link", "add", NAMES[0], "type", "veth", *peer):
        other.kill()
        sys.exit(NOT_HERE)
    this = subprocess.Popen([*command, "0"])
    this.wait()
    other.wait()


if __name__ == "__main__":
    main()
