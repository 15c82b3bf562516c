"""A checkpoint as files, one a rank: all of them or none, each with a checksum."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch

from arc_topk import _C
from arc_topk.checkpoint.contents import StateDict, meta_of
from arc_topk.checkpoint.holder import Holder
from arc_topk.checkpoint.saving import collect

_FILE = re.compile(r"arc_topk-rank-(\d+)-of-(\d+)\.pt")


def write(engine: _C.Exchange, holder: Holder, folder: Path) -> None:
    """Writes one file a rank: all of them, or, with an error on every rank, none."""
    content = collect(engine, holder, "save()", gather=False)
    rank, size = holder.group.rank(), holder.group.size()
    target = folder / f"arc_topk-rank-{rank}-of-{size}.pt"
    partial = target.with_name(target.name + ".partial")
    holder.agree("save()", _failure(lambda: _write(content, partial)))
    holder.agree("save()", _failure(lambda: os.replace(partial, target)))
    if rank == 0:
        for file, _, of in _files(folder):
            if of != size:  # of an earlier number of ranks
                file.unlink()
    holder.agree("save()", None)


def read(folder: Path, rank: int, size: int) -> StateDict:
    """What ``rank`` of ``size`` goes on with: its own file, or its share of other ranks'.

    Raises:
        ValueError: files are missing or damaged; names them.
    """
    files = {(r, of): file for file, r, of in _files(folder)}
    sizes = {of for _, of in files}
    if not sizes:
        raise ValueError(
            f"arc_topk: there is no checkpoint in '{folder}'; expected files of the name "
            "arc_topk-rank-0-of-1.pt, as State.save(folder) writes them"
        )
    if len(sizes) > 1 and size not in sizes:
        raise ValueError(
            f"arc_topk: '{folder}' has checkpoints of {sorted(sizes)} ranks, none of {size}; "
            "expected one: remove the files of the others"
        )
    old = size if size in sizes else sizes.pop()
    wanted = list(range(rank, old, size)) or [0]
    missing = [r for r in wanted if (r, old) not in files]
    if missing:
        raise ValueError(
            f"arc_topk: '{folder}' lacks the files of the ranks {missing} of {old}, which rank "
            f"{rank} of {size} goes on with; expected one a rank"
        )
    contents = [_read(files[r, old], r) for r in wanted]
    merged = dict(contents[0])
    merged["own"] = {key: parts for one in contents for key, parts in one["own"].items()}
    ids = {json.loads(one["meta"])["id"] for one in contents}
    if len(ids) > 1:
        raise ValueError(
            f"arc_topk: the files of the ranks {wanted} in '{folder}' are of {len(ids)} "
            "checkpoints; expected one: saving the last was cut short"
        )
    return merged


def _files(folder: Path) -> list[tuple[Path, int, int]]:
    """(file, rank, of how many)."""
    matches = [
        (file, _FILE.fullmatch(file.name)) for file in sorted(folder.glob("arc_topk-rank-*"))
    ]
    return [(file, int(match[1]), int(match[2])) for file, match in matches if match]


def _write(content: StateDict, path: Path) -> None:
    """The dict as bytes, and their checksum."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    data = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)
    digest = hashlib.sha256(buffer.getbuffer()).hexdigest()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        torch.save({"sha256": digest, "content": data}, file)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path, rank: int) -> StateDict:
    damaged = f"arc_topk: '{path}' is damaged"
    try:
        outer = torch.load(path, weights_only=True, map_location="cpu")
        data = outer["content"].numpy().tobytes()
        whole = hashlib.sha256(data).hexdigest() == outer["sha256"]
    except Exception as error:  # torch.load raises what it likes
        raise ValueError(f"{damaged}: {type(error).__name__}: {error}") from error
    if not whole:
        raise ValueError(f"{damaged}: its checksum is another; expected the file as it was saved")
    content: StateDict = torch.load(io.BytesIO(data), weights_only=True)
    meta_of(content)
    if f"rank_{rank}" not in content["own"]:
        raise ValueError(
            f"arc_topk: '{path}' holds the own parts of {sorted(content['own'])}; expected rank "
            f"{rank}'s: files were renamed"
        )
    return content


def _failure(work: Callable[[], None]) -> Exception | None:
    try:
        work()
    except Exception as error:  # whatever it is: the other ranks must learn of it
        return error
    return None
