"""Guards the import of the compiled module, which crashes or misbehaves with another torch."""

from importlib.util import find_spec
from pathlib import Path

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
