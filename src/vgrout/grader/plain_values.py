"""A canonical text of plain Python values: two texts are equal exactly when Python's `==` holds
between the values.

Used by the worker on what a completion returned and by the parent on what a test expects, so that
the parent compares texts and never decodes anything a completion wrote. Standard library only: the
worker loads this file by its path.
"""

import itertools
import re
from collections.abc import Callable
from typing import Any

MAX_NODES = 1_000_000  # values in one result
MAX_CHARS = 4 << 20  # characters of text in one result
MAX_DEPTH = 200
WORD = 1 << 63
ANY = "\0"  # in a text: a part that equals everything. No plain value's text has this character
TOKEN = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|.""")


class NotPlain(Exception):
    """The value is no tree of exact plain types, or is too large or too deep."""


DICTS = {("collections", "Counter"), ("collections", "defaultdict"), ("collections", "OrderedDict")}


def canonical(value: Any, equals_everything: Callable[[Any], bool] | None = None) -> str:
    """The text of a tree of int, float, bool, str, None, bytes, list, tuple, set, frozenset and
    dict, exact types only.

    As `==` has it, 1, 1.0 and True share a text, and a list and a tuple do not; sets and dicts are
    sorted by text. numpy scalars count as the Python numbers they equal, and Counter, defaultdict
    and OrderedDict as dict. Any other subclass raises `NotPlain`, whatever its `__eq__` says, or is
    written as ANY where `equals_everything` holds of it. `nan` equals nothing: the parent must
    refuse it as an expectation.

    >>> canonical([1.0, (True, None), {"b", "a"}])
    "[1, (1, None), {'a', 'b'}]"
    """
    return Writer(equals_everything).text(value, 0)


def fits(text: str, expected: str) -> bool:
    """Does a text of `canonical` with an ANY in it equal the expected one, each ANY standing for
    one whole value?

    >>> fits("[\\0, 2]", "[[1, 'a'], 2]"), fits("[\\0]", "[1, 2]")
    (True, False)
    """
    at = 0
    for number, part in enumerate(text.split(ANY)):
        at = end_of_value(expected, at) if number else at
        if not expected.startswith(part, at):
            return False
        at += len(part)
    return ANY in text and at == len(expected)


def end_of_value(text: str, start: int) -> int:
    """Where the value that begins at `start` ends in a canonical text."""
    depth = 0
    for token in TOKEN.finditer(text, start):
        if not depth and token[0] in ",:)]}":
            return token.start()
        depth += (token[0] in "([{") - (token[0] in ")]}")
    return len(text)


class Writer:
    """Writes one value within a budget of nodes and characters: a small value may unfold into an
    endless text.
    """

    def __init__(self, equals_everything: Callable[[Any], bool] | None):
        self.nodes, self.chars = MAX_NODES, MAX_CHARS
        self.equals_everything = equals_everything

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
        if self.equals_everything and self.equals_everything(v):
            return ANY
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
    """The values of a binary tree (`val`, `left`, `right`) in level order, None for a missing
    child, no None at the end.

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
