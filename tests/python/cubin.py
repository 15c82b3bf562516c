"""What ptxas made of the CUDA kernels, read with cuobjdump: no GPU is needed.

As a program (``make registers``): a table of registers, stack and spills of every kernel, which
also goes to build/cuda_registers.md.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMESPACE = "arc_topk::cuda::"


@dataclass
class Kernel:
    """One kernel for one GPU.

    Attributes:
        name: demangled, with its template arguments and without the namespaces around it.
        arch: such as "sm_90".
        registers: of a thread.
        stack, local: bytes of a thread in local memory; spilled registers lie in the stack.
        shared: bytes of a block, without what a launch adds.
        code: SASS, an instruction a line.
    """

    name: str
    arch: str
    registers: int
    stack: int
    local: int
    shared: int
    code: list[str] = field(default_factory=list, repr=False)

    def uses(self, pattern: str) -> list[str]:
        """The instructions in which ``pattern`` (a regular expression) is found."""
        return [line for line in self.code if re.search(pattern, line)]


def find_cuobjdump() -> str | None:
    """Path of cuobjdump: on PATH, in the toolkit, in PyPI's, or the one that Triton brings."""
    places = ["cuobjdump", "/usr/local/cuda/bin/cuobjdump"]
    for package, inside in (("nvidia", "cu*/bin"), ("triton", "backends/nvidia/bin")):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            places += [str(path) for path in Path(folder).glob(f"{inside}/cuobjdump")]
    return next(filter(None, map(shutil.which, places)), None)


def module() -> Path:
    """The compiled module of the package that is imported."""
    spec = importlib.util.find_spec("arc_topk._C")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin)


def read(file: Path, cuobjdump: str) -> list[Kernel]:
    """Every kernel of arc_topk in an object file, a library or a cubin."""

    def run(*options: str) -> str:
        done = subprocess.run([cuobjdump, *options, str(file)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"cuobjdump {' '.join(options)} {file}: {done.stderr.strip()}")
        return done.stdout

    kernels = parse_usage(run("-res-usage"))
    for (name, arch), code in parse_code(run("-sass")).items():
        if (name, arch) in kernels:
            kernels[name, arch].code = code
    plain = demangle([name for name, _ in kernels])
    for kernel, name in zip(kernels.values(), plain, strict=True):
        kernel.name = name
    ours = [k for k in kernels.values() if NAMESPACE in k.name]
    for kernel in ours:
        kernel.name = short(kernel.name)
    return sorted(ours, key=lambda kernel: (kernel.name, kernel.arch))


def parse_usage(text: str) -> dict[tuple[str, str], Kernel]:
    """`cuobjdump -res-usage`: kernels by (mangled name, arch)."""
    kernels = {}
    arch, name = "", ""
    for line in text.splitlines():
        if match := re.match(r"\s*arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function ([^:\s]+):", line):
            name = match[1]
        elif "REG:" in line and name:
            number = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            values = (number[key] for key in ("REG", "STACK", "LOCAL", "SHARED"))
            kernels[name, arch] = Kernel(name, arch, *values)
            name = ""
    return kernels


def parse_code(text: str) -> dict[tuple[str, str], list[str]]:
    """`cuobjdump -sass`: instructions by (mangled name, arch)."""
    codes: dict[tuple[str, str], list[str]] = {}
    arch = ""
    code: list[str] = []
    for line in text.splitlines():
        if match := re.match(r"\s*(?:arch = |code for )(sm_\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            code = codes[match[1], arch] = []
        elif match := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?;)", line):
            code.append(match[1])
    return codes


def demangle(names: list[str]) -> list[str]:
    """Names as they were written."""
    done = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def short(name: str) -> str:
    """ "Pack<float>" of "void arc_topk::cuda::(anonymous namespace)::run<Pack<float>>(...)"."""
    name = re.sub(r"\(anonymous namespace\)::", "", name)
    name = name.split(NAMESPACE, 1)[1].replace("arc_topk::", "").replace("cuda::", "")
    depth = 0
    for place, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            name = name[:place]
            break
    # All are one kernel, run<Body>(): what tells them apart is the body.
    return re.sub(r"^run<(.*?) ?>$", r"\1", name).replace("numbers::", "")


def table(kernels: list[Kernel]) -> str:
    """Markdown, a line a kernel."""
    lines = [
        "| kernel | GPU | registers | stack bytes | local bytes | shared bytes | 128-bit loads |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for k in kernels:
        numbers = (k.registers, k.stack, k.local, k.shared, len(k.uses(r"\bLDG\.E\S*\.128")))
        lines.append(f"| `{k.name}` | {k.arch} | " + " | ".join(map(str, numbers)) + " |")
    return "\n".join(lines) + "\n"


def record(kernels: list[Kernel]) -> Path:
    """Writes the table to build/cuda_registers.md."""
    file = ROOT / "build" / "cuda_registers.md"
    file.parent.mkdir(exist_ok=True)
    file.write_text(table(kernels))
    return file


def main() -> int:
    """Prints and records the table; status 1 where there is nothing to read."""
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        print("no cuobjdump: install the CUDA toolkit, or `pip install nvidia-cuda-cuobjdump`")
        return 1
    kernels = read(module(), cuobjdump)
    if not kernels:
        print(f"{module()} holds no CUDA kernel: it was built without nvcc")
        return 1
    record(kernels)
    print(table(kernels), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
