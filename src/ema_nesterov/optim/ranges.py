"""What a setting may be: a text for people and a test. Each algorithm lists its own settings with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from torch import Tensor


class Range(NamedTuple):
    text: str  # "<name> must be <text>"
    holds: Callable[[Any], bool]


def number(value: Any) -> bool:
    """A finite number, or a tensor of one, as a learning rate may be."""
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 else math.nan
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


NUMBER = Range("a number", number)
AT_LEAST_0 = Range("at least 0", lambda v: number(v) and v >= 0)
FRACTION = Range("in [0, 1)", lambda v: number(v) and 0 <= v < 1)
SHARE = Range("in [0, 1]", lambda v: number(v) and 0 <= v <= 1)
ABOVE_0 = Range("above 0 and at most 1", lambda v: number(v) and 0 < v <= 1)
COUNT = Range("a whole number, at least 1", lambda v: number(v) and isinstance(v, int) and v >= 1)
STEPS = Range("a whole number, at least 0", lambda v: number(v) and isinstance(v, int) and v >= 0)
FRACTIONS = Range(
    "two numbers in [0, 1)", lambda v: isinstance(v, tuple | list) and len(v) == 2 and all(map(FRACTION.holds, v))
)
SWITCH = Range("true or false", lambda v: isinstance(v, bool))


def one_of(choices: Collection[str]) -> Range:
    return Range(f"one of {sorted(choices)}", lambda v: isinstance(v, str) and v in choices)


def require(ranges: Mapping[str, Range], values: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the first value that is not what `ranges` says of its name."""
    for name, allowed in ranges.items():
        if name in values and not allowed.holds(values[name]):
            raise ValueError(f"{name} must be {allowed.text}, got {values[name]!r}")
