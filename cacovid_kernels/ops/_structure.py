"""Nested dicts, lists and tuples of tensors: taken apart and put together again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

Path = tuple[Any, ...]


def name_of(path: Path) -> str:
    """How a message calls the tensor at `path`: `tensors['layers'][3]`."""
    return "tensors" + "".join(f"[{key!r}]" for key in path)


def leaves(op: str, tree: Any, path: Path = ()) -> list[tuple[Path, Tensor]]:
    """Every tensor of `tree` with the keys that lead to it. None entries are left out."""
    if tree is None:
        return []
    if isinstance(tree, Tensor):
        return [(path, tree)]
    if isinstance(tree, Mapping):
        return [leaf for key, item in tree.items() for leaf in leaves(op, item, (*path, key))]
    if isinstance(tree, (list, tuple)):
        return [leaf for i, item in enumerate(tree) for leaf in leaves(op, item, (*path, i))]
    raise TypeError(f"{op}: {name_of(path)} is a {type(tree).__name__}. Pass tensors, or dicts and lists of them.")


def rebuild(tree: Any, tensors: Iterator[Tensor]) -> Any:
    """`tree` with its tensors replaced, in the order of `leaves`."""
    if tree is None:
        return None
    if isinstance(tree, Tensor):
        return next(tensors)
    if isinstance(tree, Mapping):
        return {key: rebuild(item, tensors) for key, item in tree.items()}
    items = [rebuild(item, tensors) for item in tree]
    return items if isinstance(tree, list) else tuple(items)


def option_of(option: Any, path: Path, default: Any) -> Any:
    """An option given once, or per entry of the outermost dict or list."""
    if isinstance(option, Mapping):
        return option.get(path[0], default) if path else default
    if isinstance(option, Sequence):
        return option[path[0]] if path and isinstance(path[0], int) and path[0] < len(option) else default
    return option
