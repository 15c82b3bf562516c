"""Guards the import of the compiled module, and says what it was built with.

It crashes or misbehaves with another torch than the one it was built against.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch


def check_torch() -> None:
    """Checks that `_C` is there and was built against the torch that is imported.

    Must run before `_C` is loaded: c10d's classes change their layout between versions.

    Raises:
        ImportError: `_C` is missing for this Python, or was built against another torch.
    """
    package = Path(__file__).parent
    editable = "-e " if (package.parent / "setup.py").exists() else ""
    remedy = f"in arc-topk's source folder, run `pip install --no-build-isolation {editable}.`"

    record = package / "_built_for_torch.txt"
    if not record.exists() or find_spec("arc_topk._C") is None:
        raise ImportError(f"arc_topk in {package} has no compiled module for this Python: {remedy}")
    built = record.read_text().strip()
    if built != torch.__version__:
        raise ImportError(
            f"arc_topk was built against torch {built}, but torch {torch.__version__} is imported: "
            f"to build it for this one, {remedy}"
        )


def build_info() -> dict[str, Any]:
    """What this build was made with, and for.

    Returns:
        ``version`` of arc_topk; ``torch``, the version it was built against; ``compiler``;
        ``cpu_isa``, the instruction set that the CPU kernels run with on this machine; ``cuda``:
        None for a build without CUDA kernels, else a dict of ``toolkit`` (nvcc's version) and
        ``architectures``: the compute capabilities that have machine code, such as "90", with
        "+PTX" where newer GPUs are served too.
    """
    from arc_topk import _C, __version__  # only check_torch() may come before the module

    info: dict[str, Any] = {"version": __version__, "cpu_isa": _C.cpu_isa(), **_C.build_info()}
    return info
