"""Bad input: an error that names the field, the value and what is expected."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
import typing
from fractions import Fraction
from typing import Any

import numpy
import pytest
import torch

import arc_topk


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"compressor": "topk"}, ValueError, ["compressor", "'topk'", "'top_k'"]),
        ({"feedback": "ef"}, ValueError, ["feedback", "'ef'", "'ef21m'"]),
        ({"ratio": 0}, ValueError, ["ratio", "0", "(0, 1]"]),
        ({"ratio": 1.5}, ValueError, ["ratio", "1.5", "(0, 1]"]),
        ({"ratio": 10**400}, ValueError, ["ratio", "1000", "(0, 1]"]),
        ({"ratio": Fraction(1, 10**400)}, ValueError, ["ratio", "Fraction", "(0, 1]"]),
        ({"check_every": -1}, ValueError, ["check_every", "-1", "from 0"]),
        ({"resync_every": 1.5}, TypeError, ["resync_every", "1.5", "float", "integer"]),
        ({"ratio": float("nan")}, ValueError, ["ratio", "nan", "(0, 1]"]),
        ({"ratio": "0.1"}, TypeError, ["ratio", "'0.1'", "str", "(0, 1]"]),
        ({"ratio": True}, TypeError, ["ratio", "True", "bool"]),
        ({"sketch_dim": 0}, ValueError, ["sketch_dim", "0", "from 1 to 64"]),
        ({"sketch_dim": 65}, ValueError, ["sketch_dim", "65", "from 1 to 64"]),
        ({"sketch_dim": 4.0}, TypeError, ["sketch_dim", "4.0", "float", "integer"]),
        ({"row_width": 0}, ValueError, ["row_width", "0", "from 1"]),
        ({"eta": 0.1}, ValueError, ["eta", "0.1", "ef14", "ef21m"]),
        ({"eta": 2, "feedback": "ef21m"}, ValueError, ["eta", "2", "(0, 1]"]),
        ({"start_step": -1}, ValueError, ["start_step", "-1", "from 0"]),
        ({"wire_dtype": torch.int8}, ValueError, ["wire_dtype", "int8", "bfloat16"]),
        (
            {"wire_dtype": torch.uint8, "compressor": "rand_k"},
            ValueError,
            ["wire_dtype", "uint8", "'rand_k'", "'arc_topk'"],
        ),
        ({"state_dtype": torch.float16}, ValueError, ["state_dtype", "float16", "bfloat16"]),
        ({"seed": -1}, ValueError, ["seed", "-1", "from 0"]),
        ({"seed": 2**64}, ValueError, ["seed", str(2**64)]),
        ({"spike_limit": 1}, ValueError, ["spike_limit", "1", "above 1", "None"]),
        ({"spike_limit": 0.5}, ValueError, ["spike_limit", "0.5", "above 1"]),
        ({"spike_limit": float("inf")}, ValueError, ["spike_limit", "inf", "finite"]),
        ({"spike_limit": float("nan")}, ValueError, ["spike_limit", "nan", "above 1"]),
        ({"spike_limit": "3"}, TypeError, ["spike_limit", "'3'", "str", "above 1"]),
        ({"spike_limit": True}, TypeError, ["spike_limit", "True", "bool"]),
    ],
)
def test_wrong_value(fields: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as raised:
        arc_topk.Config(**fields)
    for word in words:
        assert word in str(raised.value)


def test_extreme_values_reach_the_engine() -> None:
    config = arc_topk.Config(
        ratio=1, sketch_dim=64, row_width=2**31 - 1, seed=2**64 - 1, feedback="ef21m", eta=1
    )
    assert config.native() is not None


def test_state_takes_a_config_or_its_fields() -> None:
    assert arc_topk.State(ratio=0.3).config == arc_topk.Config(ratio=0.3)
    assert arc_topk.State(arc_topk.Config(ratio=0.3)).config.ratio == 0.3
    with pytest.raises(TypeError, match=r"not both.*ratio"):
        arc_topk.State(arc_topk.Config(), ratio=0.3)
    with pytest.raises(TypeError, match=r"0\.1.*float.*arc_topk\.Config"):
        arc_topk.State(0.1)  # type: ignore[arg-type]


def test_an_unknown_field_is_told_the_known_ones() -> None:
    with pytest.raises(TypeError) as raised:
        arc_topk.State(rato=0.3)  # type: ignore[call-arg]
    text = str(raised.value)
    assert "'rato'" in text and "did you mean 'ratio'?" in text
    for field in dataclasses.fields(arc_topk.Config):
        assert field.name in text


def test_signatures_show_the_fields() -> None:
    """Editors and type checkers read them; one list, in one order."""
    declared = typing.get_type_hints(arc_topk.config.Fields)
    assert declared == typing.get_type_hints(arc_topk.Config)
    for takes in (arc_topk.register, arc_topk.State.__init__, arc_topk.GradientExchange.__init__):
        kwargs = inspect.signature(takes).parameters["fields"]
        assert "Unpack" in str(kwargs.annotation) and "Fields" in str(kwargs.annotation)


def test_bytes_are_the_default_where_error_feedback_keeps_what_they_round() -> None:
    for compressor in ("arc_topk", "low_rank", "rand_k", "top_k", "dense"):
        for feedback in ("none", "ef14", "ef21", "ef21m"):
            if compressor == "low_rank" and feedback.startswith("ef21"):
                continue
            config = arc_topk.Config(compressor=compressor, feedback=feedback)
            on_bytes = compressor in ("arc_topk", "low_rank") and feedback == "ef14"
            assert config.wire == (torch.uint8 if on_bytes else None)
            behind = torch.bfloat16 if on_bytes and compressor == "arc_topk" else None
            assert config.sketch == behind
            asked = dataclasses.replace(config, wire_dtype=torch.float16)
            assert (asked.wire, asked.sketch) == (torch.float16, None)
    both = arc_topk.Config(compressor="low_rank", sketch_dtype=torch.bfloat16)
    assert both.wire is None  # on bytes low rank has no first collective of another type
    assert arc_topk.Config(sketch_dtype=torch.bfloat16).wire == torch.uint8
    assert arc_topk.Config(wire_dtype=torch.uint8).sketch is None


def test_fields_are_keywords() -> None:
    with pytest.raises(TypeError, match="positional"):
        arc_topk.Config("low_rank")  # type: ignore[misc]


def test_numpys_numbers_are_numbers() -> None:
    config = arc_topk.Config(
        ratio=numpy.float64(0.25),
        sketch_dim=numpy.int64(8),
        row_width=numpy.int32(16),
        start_step=numpy.uint8(3),
        seed=numpy.uint64(2**64 - 1),
    )
    assert config == arc_topk.Config(
        ratio=0.25, sketch_dim=8, row_width=16, start_step=3, seed=2**64 - 1
    )
    assert repr(config) == repr(
        arc_topk.Config(ratio=0.25, sketch_dim=8, row_width=16, start_step=3, seed=2**64 - 1)
    )
    assert config.native() is not None
    for wrong in (numpy.bool_(True), numpy.float32(3.0), numpy.array([3])):
        with pytest.raises(TypeError, match="sketch_dim"):
            arc_topk.Config(sketch_dim=wrong)
    with pytest.raises(ValueError, match="ratio is "):
        arc_topk.Config(ratio=numpy.float32("nan"))


def test_a_state_says_what_it_is() -> None:
    assert repr(arc_topk.State(ratio=0.25)) == (
        "<arc_topk.State: arc_topk, ef14, ratio=0.25; not bound yet>"
    )


def test_an_unused_state_is_pickled_as_its_config() -> None:
    state = arc_topk.State(ratio=0.3, seed=7)
    assert pickle.loads(pickle.dumps(state)).config == state.config


def test_nothing_is_known_before_binding() -> None:
    state = arc_topk.State()
    with pytest.raises(RuntimeError, match="bind"):
        state.plan()
    with pytest.raises(RuntimeError, match="bind"):
        state.metrics()
