"""A canonical text of plain Python values: two texts are equal exactly when Python's `==` holds between the values.

Used by the worker on what a completion returned and by the parent on what a test expects, so that the parent compares
texts and never decodes anything a completion wrote. Standard library only: the worker loads this file by its path.
"""

import itertools
from typing import Any

MAX_NODES = 1_000_000  # values in one result
MAX_CHARS = 4 << 20  # characters of text in one result
MAX_DEPTH = 200
WORD = 1 << 63


class NotPlain(Exception):
    """The value is no tree of exact plain types, or is too large or too deep."""


DICTS = {("collections", "Counter"), ("collections", "defaultdict"), ("collections", "OrderedDict")}


def canonical(value: Any) -> str:
    """The text of a tree of int, float, bool, str, None, bytes, list, tuple, set, frozenset and dict, exact types only.

    As `==` has it, 1, 1.0 and True share a text, and a list and a tuple do not; sets and dicts are sorted by text. numpy
    scalars count as the Python numbers they equal, and Counter, defaultdict and OrderedDict as dict. Any other subclass
    raises `NotPlain`, whatever its `__eq__` says. `nan` equals nothing: the parent must refuse it as an expectation.

    >>> canonical([1.0, (True, None), {"b", "a"}])
    "[1, (1, None), {'a', 'b'}]"
    """
    return Writer().text(value, 0)


class Writer:
    """Writes one value within a budget of nodes and characters: a small value may unfold into an endless text."""

    def __init__(self) -> None:
        self.nodes, self.chars = MAX_NODES, MAX_CHARS

    def spend(self, nodes: int, chars: int = 0) -> None:
        self.nodes -= nodes
        self.chars -= chars
        if self.nodes < 0 or self.chars < 0:
            raise NotPlain("too large")

    def number(self, v: int) -> str:
        if -WORD < v < WORD:
            return int.__repr__(v)
        self.spend(0, v.bit_length() // 4)
        return hex(v)

    def items(self, values: Any, depth: int) -> str:
        self.spend(len(values))
        if set(map(type, values)) == {int} and -WORD < min(values) and max(values) < WORD:
            joined = ", ".join(map(int.__repr__, values))
            self.spend(0, len(joined))
            return joined
        return ", ".join([self.text(v, depth) for v in values])

    def text(self, v: Any, depth: int) -> str:
        kind = type(v)
        if depth > MAX_DEPTH:
            raise NotPlain("too deep")
        if kind is int or kind is bool:
            return self.number(int(v))
        if kind is float:
            return self.number(int(v)) if v.is_integer() else repr(v)
        if kind is str or kind is bytes:
            self.spend(0, len(v))
            return repr(v)
        if v is None:
            return "None"
        if kind is list:
            return f"[{self.items(v, depth + 1)}]"
        if kind is tuple:
            return f"({self.items(v, depth + 1)})"
        if kind is set or kind is frozenset:
            self.spend(len(v))
            return "{" + ", ".join(sorted([self.text(x, depth + 1) for x in v])) + "}"
        if kind is dict or (kind.__module__, kind.__name__) in DICTS and issubclass(kind, dict):
            self.spend(len(v))
            pairs = [
                f"{self.text(k, depth + 1)}: {self.text(x, depth + 1)}" for k, x in dict.items(v)
            ]
            return "{" + ", ".join(sorted(pairs)) + ("}" if pairs else ":}")
        if kind.__module__ == "numpy" and hasattr(kind, "item") and not hasattr(kind, "__len__"):
            return self.text(v.item(), depth + 1)
        raise NotPlain(f"{kind.__name__} is not a plain type")


def list_values(node: Any) -> list[Any]:
    """The values of a linked list (`val`, `next`) from its head; [] for None."""
    values = []
    while node is not None:
        values.append(node.val)
        node = node.next
        if len(values) > MAX_NODES:
            raise NotPlain("a cycle, or too long")
    return values


def tree_values(root: Any) -> list[Any]:
    """The values of a binary tree (`val`, `left`, `right`) in level order, None for a missing child, no None at the end.

    >>> tree_values(None)
    []
    """
    values, level = [], [root]
    while any(node is not None for node in level):
        values += [None if node is None else node.val for node in level]
        level = list(
            itertools.chain.from_iterable((n.left, n.right) for n in level if n is not None)
        )
        if len(values) > MAX_NODES:
            raise NotPlain("a cycle, or too large")
    while values and values[-1] is None:
        values.pop()
    return values
