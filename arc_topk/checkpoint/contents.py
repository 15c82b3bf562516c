"""What a checkpoint is made of.

A dict of plain tensors and one string, so that whatever saves dicts can save it::

    {"meta": JSON: format, id, config, world_size, steps, compressed_steps, parameters, started
     "shared": {name: h}                                    EF21, EF21M
     "own": {"rank_3": {name: {"a": ..., "b": ...}}},       of the ranks whose parts are in it
     "basis": {name: W^T}}                                  low rank alone

"a" and "b" are docs/algorithm.md's own parts (EF14: e_i; EF21: h_i; EF21M: v_i - h_i and h_i), each
of its parameter's shape. W^T is [k, n], the same on all ranks. Parameters go by name, ranks by the
key: torch.distributed.checkpoint takes equal keys of different ranks for copies of one tensor.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import Any

import torch

from arc_topk.config import Config

FORMAT = 1
StateDict = dict[str, Any]
OwnParts = dict[str, dict[str, torch.Tensor]]  # by parameter, then "a" and "b"


def zeros_of(config: Config, tensor: torch.Tensor) -> torch.Tensor:
    """A part of a parameter with nothing in it: of its shape, in the state's type."""
    wide = tensor.dtype == torch.float64
    dtype = torch.float64 if wide else config.state_dtype or torch.float32
    return torch.zeros(tensor.shape, dtype=dtype)


def meta_text(
    config: Config,
    checkpoint: str,
    world_size: int,
    steps: int,
    compressed_steps: int,
    parameters: Mapping[str, torch.Size],
    started: list[str],
) -> str:
    """The string of a checkpoint. ``checkpoint`` is its id, the same on all ranks."""
    meta = {
        "format": FORMAT,
        "id": checkpoint,
        "config": {key: str(value) for key, value in vars(config).items()},
        "world_size": world_size,
        "steps": steps,
        "compressed_steps": compressed_steps,
        "parameters": {name: list(shape) for name, shape in parameters.items()},
        "started": started,
    }
    return json.dumps(meta)


def empty(config: Config) -> StateDict:
    """The checkpoint of a State that has no parameters yet."""
    meta = meta_text(config, uuid.uuid4().hex, 1, 0, 0, {}, [])
    bare: StateDict = {"meta": meta, "shared": {}, "own": {"rank_0": {}}}
    return bare | ({"basis": {}} if config.compressor == "low_rank" else {})


def meta_of(state_dict: StateDict) -> dict[str, Any]:
    """What a checkpoint tells of itself; ValueError where it is none, or not of this format."""
    if not isinstance(state_dict, Mapping) or {"meta", "shared", "own"} - set(state_dict):
        what = sorted(map(str, state_dict)) if isinstance(state_dict, Mapping) else state_dict
        raise ValueError(
            f"arc_topk: the checkpoint holds {str(what)[:200]}; expected 'meta', 'own' and "
            "'shared': what state_dict() of a State gave"
        )
    try:
        meta = json.loads(state_dict["meta"])
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"arc_topk: the checkpoint's 'meta' cannot be read: {error!r}") from None
    found = meta.get("format") if isinstance(meta, dict) else None
    if found != FORMAT:
        raise ValueError(
            f"arc_topk: the checkpoint is of format {found}; expected {FORMAT}: load it with the "
            "arc-topk that saved it"
        )
    _check("meta", meta, _META)
    for part in ("shared", "basis"):
        _check(part, state_dict.get(part, {}), {str: torch.Tensor})
    _check("own", state_dict["own"], {str: {str: {str: torch.Tensor}}})
    return dict(meta)


# A type; a list of such; or a dict by its keys, or by the type of any of them.
_META = {
    "id": str,
    "config": {"feedback": str},
    "world_size": range(1, 2**31),
    "steps": range(2**63),
    "compressed_steps": range(2**63),
    "parameters": {str: [range(2**63)]},
    "started": [str],
}


def _check(where: str, value: Any, expected: Any) -> None:
    """Raises ValueError where ``value`` is not made as ``expected``."""
    fits = True
    if isinstance(expected, range):
        fits = type(value) is int and value in expected
    elif isinstance(expected, list):
        fits = isinstance(value, list)
    elif isinstance(expected, dict):
        fits = isinstance(value, Mapping)
    else:
        fits = isinstance(value, expected)
    if not fits:
        raise ValueError(
            f"arc_topk: the checkpoint is damaged: '{where}' is {str(value)[:80]!r}; "
            "expected what state_dict() gave"
        )
    if isinstance(expected, list):
        for one in value:
            _check(where, one, expected[0])
    if isinstance(expected, dict):
        by_type = expected.get(str)
        for key, of in dict.fromkeys(value, by_type).items() if by_type else expected.items():
            _check(f"{where}.{key}", value.get(key), of)
            if not isinstance(key, str):
                raise ValueError(
                    f"arc_topk: the checkpoint is damaged: '{where}' has a key {key!r}"
                )
