"""Network namespaces without names: a process holds each."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


class LabError(RuntimeError):
    """The machine cannot do what was asked; the message says what to do."""


class Namespace:
    """One network namespace, its loopback up. Ends by `close`, or with this process.

    Raises:
        LabError: the system refuses it.
    """

    def __init__(self) -> None:
        # It holds the namespace for as long as this process keeps the pipe open.
        self._holder = subprocess.Popen(
            ["unshare", "--net", "--", "sh", "-c", "echo ready; exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self._holder.stdout is not None and self._holder.stderr is not None
        if self._holder.stdout.readline() != b"ready\n":
            said = self._holder.stderr.read().decode().strip()
            raise LabError(f"no network namespace can be had: {said}")
        self.run("ip", "link", "set", "lo", "up")

    @property
    def pid(self) -> int:
        """Of the process that holds it: `ip link ... netns PID`."""
        return self._holder.pid

    def command(self, *argv: str) -> list[str]:
        """``argv``, to be run inside; it is killed when this process ends."""
        inside = ["nsenter", f"--net=/proc/{self.pid}/ns/net", "--"]
        return [*inside, "setpriv", "--pdeathsig", "KILL", *argv]

    def run(self, *argv: str) -> str:
        """Runs a command inside and returns its output.

        Raises:
            LabError: it failed.
        """
        done = subprocess.run(self.command(*argv), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise LabError(f"`{' '.join(argv)}` failed: {done.stderr.strip()}")
        return done.stdout

    def close(self) -> None:
        """Lets it go, with all interfaces in it."""
        self._holder.kill()
        self._holder.wait()
        for pipe in (self._holder.stdin, self._holder.stdout, self._holder.stderr):
            assert pipe is not None
            pipe.close()


def become_root(program: str | Path, arguments: Sequence[str]) -> None:
    """Goes on as root of an own user namespace, where this process is not root already.

    Args:
        program: to be started anew: a script, or a module for ``python -m``.
        arguments: its command line.

    Raises:
        LabError: the system has no user namespaces for users.
    """
    if os.geteuid() == 0:
        return
    own = ["unshare", "--user", "--map-root-user", "--net", "--"]
    if subprocess.run([*own, "true"], capture_output=True, check=False).returncode != 0:
        raise LabError(
            "not root, and this system lets users have no namespaces: run it as root (sudo), or "
            "allow them (sysctl kernel.unprivileged_userns_clone=1, or "
            "kernel.apparmor_restrict_unprivileged_userns=0)"
        )
    start = [str(program)] if isinstance(program, Path) else ["-m", program]
    os.execvp(own[0], [*own, sys.executable, *start, *arguments])
