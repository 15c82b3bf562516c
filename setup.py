"""Builds arc_topk/_C by driving CMake; everything else about the package is in pyproject.toml.

The build folder is build/<ABI>-torch-<version>-<hash of sys.prefix>, so that switching between
interpreters or torch versions rebuilds nothing that was built before. Two environment variables
are for the Makefile: ARC_TOPK_TESTS ("required", "optional") adds the C++ tests, and
ARC_TOPK_WERROR=1 makes warnings errors.
"""

import fcntl
import hashlib
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent
COMMAND = "pip install --no-build-isolation -e ."
OLDEST_TORCH = (2, 11)
OLDEST_SETUPTOOLS = 77  # the first to read `license = "BSD-3-Clause"` in pyproject.toml


def fail(message: str) -> None:
    """Ends the build with one line and no traceback."""
    raise SystemExit(f"arc-topk: {message}")


def torch_version() -> str:
    """The version of the torch to build against, found without the slow import of it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        fail(
            "torch is not there, or pip builds in isolation from it: install torch, "
            f"then run `{COMMAND}` (leave out -e for a copy)"
        )
    version = runpy.run_path(str(Path(spec.origin).with_name("version.py")))["__version__"]
    if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < OLDEST_TORCH:
        fail(
            f"torch {version} is too old, 2.11 is the oldest: "
            f"run `pip install -U torch`, then `{COMMAND}`"
        )
    return str(version)


def find_program(*names: str) -> str | None:
    """Path of the first of these programs that is found beside the interpreter or on PATH."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    return next(filter(None, (shutil.which(name, path=path) for name in names)), None)


def check_tools() -> str:
    """Path of CMake; ends with one line if it, or a C++ compiler, is missing."""
    cmake = find_program("cmake")
    if cmake is None:
        fail("CMake is missing: run `pip install cmake ninja`, or install your system's")
    compiler = os.environ.get("CXX", "").split()[:1] or ["c++", "g++"]
    if find_program(*compiler) is None:
        fail(
            f"no C++ compiler ({', '.join(compiler)}) is found: install g++ 12 or newer "
            "(`apt-get install g++`), or name yours with CXX="
        )
    return cmake


def check_setuptools(version: str) -> None:
    """Ends with one line if setuptools cannot read pyproject.toml."""
    if int(version.split(".")[0]) < OLDEST_SETUPTOOLS:
        fail(
            f"setuptools {version} is too old, {OLDEST_SETUPTOOLS} is the oldest: "
            f"run `pip install 'setuptools>={OLDEST_SETUPTOOLS}'`, then `{COMMAND}`"
        )


def build(cmake: str, torch: str, prefix: Path) -> None:
    """Configures and builds what has changed and installs the module into prefix/arc_topk."""
    prefix_hash = hashlib.sha256(sys.prefix.encode()).hexdigest()[:6]
    folder = ROOT / "build" / f"{sysconfig.get_config_var('SOABI')}-torch-{torch}-{prefix_hash}"
    configure = [cmake, "-S", str(ROOT), "-B", str(folder), f"-DPython_EXECUTABLE={sys.executable}"]
    # A choice made once stays in CMake's cache: `pip install` after `make` rebuilds nothing.
    choices = ("ARC_TOPK_TESTS", "ARC_TOPK_WERROR")
    configure += [f"-D{name}={os.environ[name]}" for name in choices if name in os.environ]
    ninja = find_program("ninja")
    if ninja and not (folder / "CMakeCache.txt").exists():
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
    install = [cmake, "--install", str(folder), "--prefix"]

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two builds at once would overwrite each other's objects
        run(*configure, "--log-level=WARNING", quiet=True)
        run(cmake, "--build", str(folder), "--parallel", jobs)
        run(*install, str(prefix), "--component", "python", quiet=True)
        if os.environ.get("ARC_TOPK_TESTS"):
            run(*install, str(ROOT / "build"), "--component", "tests", quiet=True)


def run(*command: str, quiet: bool = False) -> None:
    """Runs a command; ends with one line below the command's own messages if it fails."""
    if subprocess.run(command, stdout=subprocess.DEVNULL if quiet else None).returncode:
        fail(f"`{' '.join(command)}` failed, see its messages above")


if __name__ == "__main__":
    # Before setuptools does anything: the one line of what is missing is then all that pip shows.
    TORCH = torch_version()
    CMAKE = check_tools()

    import setuptools
    from setuptools.command.build_ext import build_ext

    check_setuptools(setuptools.__version__)

    class CMakeBuild(build_ext):
        """The build_ext command, done by CMake."""

        def run(self) -> None:
            """Builds in place (editable installs too) or into the wheel's folder."""
            build(CMAKE, TORCH, ROOT if self.inplace else Path(self.build_lib).resolve())

    setuptools.setup(
        ext_modules=[setuptools.Extension("arc_topk._C", sources=[])],
        cmdclass={"build_ext": CMakeBuild},
    )
