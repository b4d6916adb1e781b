r"""The code of a completion: the last closed python block that defines the entry point, outside
thinking; the last closed python block where none defines it. Nothing here parses a completion.

- A block opens with three or more backticks or tildes and a name of python (`python`, `py`,
  `python3`, `{.python}`, any case), after spaces or with attributes behind it; it closes with as
  many of the same (CommonMark). A fence without a language opens no block, and one with another
  name than python's behind it may close one, which is more than CommonMark allows.
- In a list item or a quote, what stands before the fence is taken off every line.
- A fence inside a triple-quoted string of the code is text. An opening fence outside a string means
  that the block before it was never closed: an unclosed block is none.
- `<think>` at the beginning of a line opens thinking, `</think>` closes it, also where the prompt
  opened it. Thinking that is never closed holds no answer.
"""

import re
from collections.abc import Iterator

TAG = "(?:think|thinking|thought|reasoning)"
THINKING = re.compile(rf"^[ \t]*<({TAG})>.*?(?:</\1>|\Z)", re.S | re.M | re.I)
END_OF_THINKING = re.compile(rf"(?<![\"'`])</{TAG}>(?![\"'])", re.I)
MARKERS = r"[ \t]*(?:(?:>|[-*+]|\d{1,9}[.)])[ \t]+|>)*"
FENCE = re.compile(rf"(?P<before>{MARKERS})(?P<fence>`{{3,}}|~{{3,}})(?P<info>.*)")
PYTHON = re.compile(r"[ \t]*\{?[ \t.]*(?:python|py)[\d.]*(?![\w+-])", re.I)
QUOTE_MARK = re.compile(r"[ \t]*>[ \t]?")
STRING = re.compile(r"""\\.|"{3}|'{3}|["'#]""", re.S)
FENCES_IN_A_STRING = 20  # more of them mean that the string was never meant to be one


def extract_code(completion: str, entry_point: str = "") -> str | None:
    r"""The code that is graded, None if there is none; `entry_point` is the method of `Solution`.

    >>> extract_code("Here:\n```python\nx = 1\n```\n")
    'x = 1\n'
    """
    answer = END_OF_THINKING.split(THINKING.sub("\n", completion))[-1]
    blocks = list(_closed_blocks(answer.split("\n")))
    defining = [code for code in blocks if entry_point and _defines(code, entry_point)]
    return (defining or blocks or [None])[-1]


def _closed_blocks(lines: list[str]) -> Iterator[str]:
    at = 0
    while at < len(lines):
        opening = FENCE.fullmatch(lines[at])
        at += 1
        if opening and _names_python(opening):
            end, following = _end(lines, at, opening)
            if end is not None:
                yield "".join(f"{_inside(line, opening['before'])}\n" for line in lines[at:end])
            at = following


def _end(lines: list[str], start: int, opening: re.Match[str]) -> tuple[int | None, int]:
    """(line of the closing fence, None for an unclosed block; where to go on).

    It is the first closing fence outside a triple-quoted string; the first of all where a string
    runs on to the next block, which it was not meant to.
    """
    quotes, first, skipped = "", None, 0
    for at in range(start, len(lines)):
        line = _inside(lines[at], opening["before"])
        fence = FENCE.fullmatch(line)
        if fence and not _names_python(fence) and fence["fence"].startswith(opening["fence"]):
            if not quotes:
                return at, at + 1
            first = at if first is None else first
        elif fence and _names_python(fence) and not quotes:
            break
        skipped += fence is not None
        if skipped > FENCES_IN_A_STRING:
            break
        quotes = _open_quotes(line, quotes)
    else:
        at = start
    return first, at if first is None else first + 1


def _names_python(fence: re.Match[str]) -> bool:
    return PYTHON.match(fence["info"]) is not None and "`" not in fence["info"]


def _inside(line: str, before: str) -> str:
    """A line of a block without the marks and the indentation that its fence has, or less."""
    for _ in range(before.count(">")):
        line, before = (
            QUOTE_MARK.sub("", line, count=1),
            QUOTE_MARK.sub("", before, count=1),
        )
    body = line.lstrip(" \t")
    indent = len(line.removesuffix(body).expandtabs())
    return " " * max(indent - len(before.expandtabs()), 0) + body if before else line


def _open_quotes(line: str, quotes: str) -> str:
    """The quotes of the triple-quoted string that is open behind the line, "" for none; `quotes`
    are those that are open before it."""
    for token in STRING.findall(line):
        if quotes:
            quotes = "" if token == quotes else quotes
        elif token == "#":
            break
        elif token[0] in "\"'":
            quotes = token
    return quotes if len(quotes) == 3 else ""


def _defines(code: str, entry_point: str) -> bool:
    """Whether the class `Solution` and the entry point are defined, outside strings."""
    quotes, found, name = "", set(), re.escape(entry_point)
    patterns = (
        r"^\s*class\s+Solution\b",
        rf"^[^#]*(?:\bdef\s+{name}\b|\b{name}\s*=(?!=))",
    )
    for line in code.split("\n"):
        if not quotes:
            found |= {pattern for pattern in patterns if re.search(pattern, line)}
        quotes = _open_quotes(line, quotes)
    return len(found) == len(patterns)
