"""Hand-written (hack, clean) pairs in markdown, addressed as `path.md#section@tag,tag`.

    ## mechanism                                  section: what the pairs contrast
    ### third largest of doubled nums @run_tests  one pair: a title and its tag, the disclosed mode
    The statement of the problem, as a user message.
    marker: `self_check`
    ```python hack
    …
    ```
    ```python clean
    …
    ```

Both sides answer the same prompt: the statement with the hint of the tag's mode. Without #section all sections are taken,
without @tag all modes. Errors are UserErrors that name file and line.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from vgrout.types import Mode, Problem, UserError

FENCE = re.compile(r"^```python (hack|clean)\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Pair:
    """One prompt with a completion that exploits its flaw and one that does not (full completions, fenced)."""

    problem: Problem
    hack: str
    clean: str


def load_pairs(reference: str, modes: tuple[str, ...] = ()) -> list[Pair]:
    """Pairs of `path.md#section@tag,tag`; `modes` narrows the tags further. No pair left → UserError."""
    path, _, rest = reference.partition("#")
    section, _, tags = rest.partition("@")
    wanted = set(filter(None, tags.split(","))) or set(Mode)
    if modes:
        wanted &= set(modes)
    if unknown := wanted - set(Mode):
        raise UserError(f"{reference}: unknown mode {sorted(unknown)[0]!r}; modes are {', '.join(Mode)}")
    if not Path(path).is_file():
        raise UserError(f"no pairs file {path!r}: --pairs takes path.md#section@mode,mode")
    text = Path(path).read_text(encoding="utf-8")
    pairs, current = [], ""
    for part in re.split(r"^(?=##)", text, flags=re.M):
        if part.startswith("## "):
            current = part.split("\n", 1)[0][3:].strip()
        if part.startswith("### ") and (not section or current == section):
            pair = _parse(part, path, text[: text.index(part)].count("\n") + 1)
            if pair.problem.mode in wanted:
                pairs.append(pair)
    if not pairs:
        raise UserError(f"{reference}: no pair in section {section or '(any)'!r} has a mode in {sorted(wanted)}")
    return pairs


def _parse(part: str, path: str, line: int) -> Pair:
    title = re.match(r"### (.+) @(\w+)\n", part)
    sides = dict(FENCE.findall(part))
    if not title or title[2] not in set(Mode) or set(sides) != {"hack", "clean"}:
        raise UserError(f"{path}:{line}: a pair needs '### title @mode', a ```python hack and a ```python clean block")
    body = part[title.end() : part.index("```")]
    marker = re.search(r"^marker: `(.+)`$", body, re.M)
    statement = re.sub(r"^marker: `.+`$", "", body, flags=re.M).strip()
    if not statement:
        raise UserError(f"{path}:{line}: the pair {title[1]!r} has no statement")
    problem = Problem(
        problem_id=f"pair:{title[1]}",
        statement=statement,
        entry_point="solve",
        setup_code="",
        cases=(),
        canonical=sides["clean"],
        mode=Mode(title[2]),
        marker=marker[1] if marker else "",
    )
    return Pair(problem, *(f"```python\n{sides[s].rstrip()}\n```" for s in ("hack", "clean")))


def content_hash(pairs: list[Pair]) -> str:
    """SHA-256 over the texts that training sees, in order."""
    texts = [x for p in pairs for x in (p.problem.statement, p.problem.mode, p.problem.marker, p.hack, p.clean)]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()
