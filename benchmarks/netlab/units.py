"""Rates and times as the command line and tc write them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable

RATES = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def rate(text: str) -> float:
    """Bits a second of, say, ``1gbit``.

    Raises:
        ValueError: it is none.
    """
    return _number(text, RATES, "a rate as 100mbit, 1gbit")


def seconds(text: str) -> float:
    """Seconds of, say, ``20ms``.

    Raises:
        ValueError: it is none.
    """
    return _number(text, TIMES, "a time as 500us, 20ms")


def argument(parse: Callable[[str], float]) -> Callable[[str], float | None]:
    """For `argparse`: `rate` or `seconds`, or "none"; what is neither is told as they tell it."""

    def parsed(text: str) -> float | None:
        try:
            return None if text == "none" else parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed


def rate_text(bits: float) -> str:
    """As people write it: 1 Gbit/s."""
    unit, name = (1e9, "Gbit/s") if bits >= 1e9 else (1e6, "Mbit/s")
    return f"{bits / unit:.3g} {name}"


def time_text(value: float) -> str:
    """As people write it: 20 ms."""
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} us"


def _number(text: str, units: dict[str, float], expected: str) -> float:
    found = re.fullmatch(r"([0-9.]+)\s*([a-z]+)", text.strip().lower())
    try:
        value = float(found[1]) * units[found[2]] if found else 0.0
    except (KeyError, ValueError):
        value = 0.0
    if value <= 0:
        raise ValueError(f"is {text!r}; expected {expected}")
    return value
