"""Builds arc_topk/_C by driving CMake; everything else about the package is in pyproject.toml.

The build folder is build/<ABI>-torch-<version>-<hash of sys.prefix>, so that switching between
interpreters or torch versions rebuilds nothing that was built before. Environment variables choose;
what they chose stays in the build folder until they choose otherwise:

    ARC_TOPK_CUDA=0         no CUDA kernels; 1: it is an error if nvcc is missing
    ARC_TOPK_CUDA_ARCHS     GPUs to compile for: "90", "80;90+PTX" (PTX: newer GPUs too)
    TORCH_CUDA_ARCH_LIST    the same, where the former is not set: "8.0 9.0+PTX"
    CUDACXX, CUDA_HOME, CUDA_PATH
                            where nvcc is; else PATH, /usr/local/cuda, PyPI's nvidia-cuda-nvcc

Two are for the Makefile: ARC_TOPK_TESTS ("required", "optional") adds the C++ tests, and
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
# Compute capabilities of a build that is not told otherwise, as far as its nvcc knows them.
RELEASE_ARCHS = ("75", "80", "86", "89", "90", "100", "120")
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


def find_nvcc() -> str | None:
    """Path of nvcc: as the environment says, else on PATH, /usr/local/cuda, or from PyPI.

    Ends with one line if the environment names one that is not there.
    """
    named = os.environ.get("CUDACXX")
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if not named and os.environ.get(variable):
            named = str(Path(os.environ[variable], "bin", "nvcc"))
    if named:
        found = find_program(named)
        if found is None:
            fail(
                f"no nvcc at {named}, where CUDACXX, CUDA_HOME or CUDA_PATH has it: correct that, "
                "or set ARC_TOPK_CUDA=0 for a build without CUDA"
            )
        return found
    spec = importlib.util.find_spec("nvidia")  # a namespace that NVIDIA's packages share
    folders = list(spec.submodule_search_locations or ()) if spec else []
    pypi = [str(path) for folder in folders for path in Path(folder).glob("cu*/bin/nvcc")]
    return find_program("nvcc", "/usr/local/cuda/bin/nvcc", *sorted(pypi, reverse=True))


def known_archs(nvcc: str) -> list[str]:
    """The compute capabilities that nvcc compiles for: ["75", "80", ...]."""
    done = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False)
    if done.returncode:
        fail(f"`{nvcc} --list-gpu-arch` failed: {(done.stderr + done.stdout).strip()}")
    return re.findall(r"compute_(\d+)", done.stdout)


def parse_archs(variable: str, value: str, known: list[str]) -> str:
    """GPUs to compile for, as CMake names them.

    Args:
        variable: the environment variable's name, for errors.
        value: compute capabilities with or without a dot, separated by semicolons, commas or
            spaces: "80;90+PTX", "8.0 9.0+PTX".
        known: those nvcc compiles for.

    Returns:
        "80-real;90": machine code for both, and PTX of the last.
    """
    names = []
    for item in re.split(r"[;,\s]+", value.strip(" ;,\t\n")):
        match = re.fullmatch(r"(\d+?)\.?(\d[af]?)(\+PTX)?", item, re.IGNORECASE)
        number = match and match[1] + match[2].lower()
        if not match or not number or number.rstrip("af") not in known:
            fail(
                f"{variable} is {value!r}, and {item!r} in it is not a compute capability that "
                f"nvcc compiles for; expected some of {' '.join(known)}, each perhaps with +PTX, "
                "such as '80;90+PTX'"
            )
        names.append(f"{number}" if match[3] else f"{number}-real")
    return ";".join(names)


def cuda_choices(kept: dict[str, str]) -> list[str]:
    """CMake's arguments about CUDA: what the environment chooses, else what was kept, else found.

    Args:
        kept: what is in CMake's cache.
    """
    choice = os.environ.get("ARC_TOPK_CUDA", kept.get("ARC_TOPK_CUDA", ""))
    if choice not in ("", "0", "1"):
        fail(f"ARC_TOPK_CUDA is {choice!r}; expected 0 (no CUDA), 1 (CUDA required) or nothing")
    arguments = [f"-DARC_TOPK_CUDA={choice}"]
    if choice == "0":
        return arguments
    nvcc: str | None = kept.get("CMAKE_CUDA_COMPILER")
    if nvcc is None or "CUDACXX" in os.environ or not Path(nvcc).exists():
        nvcc = find_nvcc()
    if nvcc is None:
        if choice == "1":
            fail(
                "ARC_TOPK_CUDA is 1, but no nvcc is found: install the CUDA toolkit, or "
                'PyPI\'s (README.md, "CUDA"), or say where it is with CUDACXX'
            )
        return [*arguments, "-UCMAKE_CUDA_COMPILER"]
    if nvcc != kept.get("CMAKE_CUDA_COMPILER"):
        arguments.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
    variables = ("ARC_TOPK_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST")
    variable = next((name for name in variables if os.environ.get(name, "").strip()), None)
    if variable:
        archs = parse_archs(variable, os.environ[variable], known_archs(nvcc))
    elif "CMAKE_CUDA_ARCHITECTURES" in kept:
        return arguments
    else:
        known = known_archs(nvcc)
        release = " ".join(arch for arch in RELEASE_ARCHS if arch in known)
        archs = parse_archs("RELEASE_ARCHS", f"{release}+PTX", known)
    return [*arguments, f"-DCMAKE_CUDA_ARCHITECTURES={archs}"]


def read_cache(folder: Path) -> dict[str, str]:
    """What is in CMake's cache; nothing before the first build."""
    cache = folder / "CMakeCache.txt"
    text = cache.read_text() if cache.exists() else ""
    return dict(re.findall(r"^(\w+):\w+=(.+)$", text, re.MULTILINE))


def build(cmake: str, torch: str, prefix: Path) -> None:
    """Configures and builds what has changed and installs the module into prefix/arc_topk."""
    prefix_hash = hashlib.sha256(sys.prefix.encode()).hexdigest()[:6]
    folder = ROOT / "build" / f"{sysconfig.get_config_var('SOABI')}-torch-{torch}-{prefix_hash}"
    configure = [cmake, "-S", str(ROOT), "-B", str(folder), f"-DPython_EXECUTABLE={sys.executable}"]
    # A choice made once stays in CMake's cache: `pip install` after `make` rebuilds nothing.
    choices = ("ARC_TOPK_TESTS", "ARC_TOPK_WERROR")
    configure += [f"-D{name}={os.environ[name]}" for name in choices if name in os.environ]
    configure += cuda_choices(read_cache(folder))
    ninja = find_program("ninja")
    if ninja and not (folder / "CMakeCache.txt").exists():
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
    install = [cmake, "--install", str(folder), "--prefix"]

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two builds at once would overwrite each other's objects
        run_configure(folder, *configure, "--log-level=WARNING")
        run(cmake, "--build", str(folder), "--parallel", jobs)
        run(*install, str(prefix), "--component", "python", quiet=True)
        if os.environ.get("ARC_TOPK_TESTS"):
            run(*install, str(ROOT / "build"), "--component", "tests", quiet=True)


def run_configure(folder: Path, *command: str) -> None:
    """Runs CMake. A first time that fails leaves nothing, which would keep the compiler refused."""
    cache = folder / "CMakeCache.txt"
    first = not cache.exists()
    try:
        run(*command, quiet=True)
    except SystemExit:
        if first:
            cache.unlink(missing_ok=True)
            shutil.rmtree(folder / "CMakeFiles", ignore_errors=True)
        raise


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
