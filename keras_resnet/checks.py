"""Checks of arguments, and the parts that their error messages have in common. Everything else may import this module."""

import difflib
import math
import numbers
from collections.abc import Iterable, Sequence
from typing import TypeGuard

# Up to this many names are listed in a message; of longer lists only similar names are shown.
LISTED = 12


def closest(word: object, options: Iterable[object], *, count: int = 3, cutoff: float = 0.6) -> list[str]:
    """Return the known names that are most similar to a word, the best first.

    Args:
        word: The name that was given.
        options: The known names.
        count: Largest number of names. Default 3.
        cutoff: Similarity, from 0 to 1, that a name must have. Default 0.6.
    """
    return difflib.get_close_matches(str(word), [str(option) for option in options], n=count, cutoff=cutoff)


def nearest(word: object, options: Iterable[object]) -> str:
    """Return the end of a message about an unknown name: what may have been meant, or the whole list if it is short.

    Args:
        word: The name that was given.
        options: The known names.

    Returns:
        `"; did you mean 'a' or 'b'?"`, `"; choose from a, b"`, or `""` if there are many names and none is similar.
    """
    names = [str(option) for option in options]
    if near := closest(word, names):
        return f"; did you mean {' or '.join(map(repr, near))}?"
    return f"; choose from {', '.join(names)}" if 0 < len(names) <= LISTED else ""


def sides_and_channels(shape: Sequence[int | None], data_format: str) -> tuple[tuple[int | None, ...], int | None]:
    """Return the spatial sides of a tensor and its number of channels, each None where it is dynamic.

    Args:
        shape: Shape with the batch.
        data_format: `"channels_last"` or `"channels_first"`.
    """
    _, *rest = shape
    return (tuple(rest[1:]), rest[0]) if data_format == "channels_first" else (tuple(rest[:-1]), rest[-1])


def first_line(error: object) -> str:
    """Return the first line of an error's message without its full stop, or the name of its class if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value is a real number of Python or NumPy. A bool does not count."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_whole_number(value: object, at_least: int) -> TypeGuard[float]:
    """Return whether a value is a whole number (`2.0` counts) of at least `at_least`."""
    return is_number(value) and math.isfinite(value) and value >= at_least and int(value) == value


def whole_number(name: str, value: object, at_least: int) -> int:
    """Return a value as an int.

    Raises:
        ValueError: It is not a whole number, or it is below `at_least`; the message names the argument.
    """
    if not is_whole_number(value, at_least):
        raise ValueError(f"`{name}` must be a whole number of at least {at_least}, got {value!r}")
    return int(value)


def positive_integer(name: str, value: object) -> int:
    """Return a value that is an int of at least 1; unlike `whole_number` a float such as `2.0` is refused, since configs keep it.

    Raises:
        ValueError: It is something else; the message names the argument.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}")
    return int(value)


def positive_number(name: str, value: object) -> float:
    """Return a value as a float.

    Raises:
        ValueError: It is not a positive finite number; the message names the argument.
    """
    if not is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"`{name}` must be a positive finite number, got {value!r}")
    return float(value)


def probability(name: str, value: object) -> float:
    """Return the probability with which something is dropped as a float.

    Raises:
        ValueError: It is not a number in [0, 1); the message names the argument.
    """
    if not is_number(value) or not 0 <= value < 1:
        raise ValueError(f"`{name}` must be at least 0 and below 1, got {value!r}")
    return float(value)
