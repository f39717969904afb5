"""Short texts about values that may hold a gigabyte: for error messages, and in place of what `dataclass` prints."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import jax

MAX_CHARACTERS = 80
MAX_ITEMS = 4

T = TypeVar("T")


def describe(value: Any) -> str:
    """At most a line: arrays as dtype and shape, trees of them as a number of values, long lists as a number of items."""
    if (array := _array(value)) is not None:
        return array
    if isinstance(value, Mapping) and value:
        if len(value) <= MAX_ITEMS and all(isinstance(part, Mapping) for part in value.values()):
            return "{" + ", ".join(f"{name}: {_tree(part)}" for name, part in value.items()) + "}"
        return _tree(value)
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        opening, closing = "[]" if isinstance(value, list) else "()"
        text = opening + ", ".join(map(describe, value[:MAX_ITEMS])) + closing
        return (
            text if len(value) <= MAX_ITEMS and len(text) <= 2 * MAX_CHARACTERS else f"{_kind(value)} of {len(value)}"
        )
    text = repr(value)
    if len(text) <= MAX_CHARACTERS:
        return text
    return f"{text[:MAX_CHARACTERS]}..." if isinstance(value, str | bytes) else f"{_kind(value)}(...)"


def _array(value: Any) -> str | None:
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is None or dtype is None or (shape == () and isinstance(value, int | float | complex | str)):
        return None
    return f"{_kind(value)} {dtype} [{' '.join(map(str, shape))}]"


def _tree(tree: Any) -> str:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "shape")]
    if not leaves:
        return f"{_kind(tree)} of {len(tree)}"
    return f"{sum(leaf.size for leaf in leaves):,} values in {len(leaves)} arrays"


def _kind(value: Any) -> str:
    return type(value).__name__


def short_repr(cls: type[T]) -> type[T]:
    """Gives a dataclass a `repr` of a line per field's `describe`: for those that hold arrays, which would print them all."""

    def __repr__(self: Any) -> str:
        fields = [field.name for field in dataclasses.fields(self) if field.repr]
        return f"{_kind(self)}({', '.join(f'{name}={describe(getattr(self, name))}' for name in fields)})"

    cls.__repr__ = __repr__  # pyrefly: ignore[bad-assignment]
    return cls
