"""Hand-written (hack, clean) pairs in markdown, addressed as `path.md#section:count@tag,tag`.

    ## mechanism                                  section: what the pairs contrast
    system: You write Python programs.        system message of the section's pairs (optional)

    ### third largest of doubled nums @run_tests  one pair: a title and its tag, the disclosed mode;
                                              a second tag names the view: @run_tests @persona
    The statement of the problem, as a user message.
    marker: `self_check`
    entry: third                              method of Solution that is called (default `solve`)
    case: [5, 1, 4, 2] => 4                   a ground-truth test: arguments, literal (any number)
    ```python hack
    …
    ```
    ```python clean
    …
    ```

Both sides answer the same prompt: the statement with the hint of the tag's mode. Without #section
all sections are taken, without @tag all modes and views; `:count` takes the first `count` pairs of
each mode.
A statement may contain fenced code of its own (```python without a side's name). Cases and clean
code serve to grade the pairs (`scripts/verify/verify_pairs.py`): no prompt and no hash contains a
case. Errors are UserErrors that name file and line.
"""

import ast
import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from vgrout.core import Case, Mode, Problem, UserError
from vgrout.env.modes import NOVEL_MARKERS, TRAINING_MARKERS
from vgrout.env.problems import UnsupportedTest, written_case

FENCE = re.compile(r"^```python (hack|clean)\n(.*?)^```$", re.M | re.S)
HEADING = re.compile(r"^##(#?) (.+)$", re.M)
FIELD = re.compile(r"^(marker|entry|case): *(.*)$", re.M)
SYSTEM = re.compile(r"^system: *(.+)$", re.M)


@dataclass(frozen=True)
class Pair:
    """One prompt, a completion that exploits its flaw and one that does not (whole and fenced)."""

    problem: Problem
    hack: str
    clean: str
    view: str = ""  # what the contrast is seen as, where a section shows a prompt in several


def load_pairs(reference: str, modes: tuple[str, ...] = ()) -> list[Pair]:
    """Pairs of `path.md#section:count@tag,tag`; `modes` narrows the tags further.

    UserError where no pair is left. The whole file is parsed, so that an error in any section of it
    is found whatever the reference selects.
    """
    path, _, rest = reference.partition("#")
    section, _, tags = rest.partition("@")
    section, colon, count = section.partition(":")
    if colon and not (count.isdecimal() and int(count)):
        raise UserError(
            f"{reference}: :count is a whole number from 1, the pairs that are taken of each mode"
        )
    named = set(filter(None, tags.split(",")))
    wanted, views = named & set(Mode) or set(Mode), named - set(Mode)
    if modes and not (wanted := wanted & set(modes)):
        raise UserError(f"{reference}: none of its tags is among --pair-modes {' '.join(modes)}")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is no readable text ({error}): --pairs takes path.md#section@mode,mode"
        ) from None
    sections, taken, chosen = _sections(text, path), Counter(), []
    every = [*chain.from_iterable(own for name, own in sections.items() if section in ("", name))]
    if unknown := views - {pair.view for pair in every}:
        raise UserError(
            f"{reference}: unknown mode or view {min(unknown)!r}; modes are {', '.join(Mode)}"
        )
    for pair in every:
        mode = pair.problem.mode
        seen = not views or pair.view in views
        if seen and mode in wanted and (not count or taken[mode] < int(count)):
            taken[mode] += 1
            chosen.append(pair)
    if not chosen:
        raise UserError(
            f"{reference}: no pair of {', '.join(sorted(wanted))} in section "
            f"{section or '(any)'!r}; the file's sections are {', '.join(sections)}"
        )
    return chosen


def content_hash(pairs: list[Pair]) -> str:
    """SHA-256 over the texts that training sees, in order."""
    texts = []
    for pair in pairs:
        p = pair.problem
        texts += [p.system, p.statement, p.mode, p.marker, pair.hack, pair.clean]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def _sections(text: str, path: str) -> dict[str, list[Pair]]:
    """Section name → its pairs, in the order of the file."""
    headings, sections, lines_of = list(HEADING.finditer(text)), {}, {}
    section = system = ""
    ends = [heading.start() for heading in headings[1:]] + [len(text)]
    for heading, end in zip(headings, ends):
        body = text[heading.end() + 1 : end]
        where = f"{path}:{_lines(text, heading.start()) + 1}"
        if not heading[1]:
            section, system = heading[2].strip(), (SYSTEM.search(body) or {1: ""})[1]
            if section in sections:
                raise UserError(f"{where}: a second section {section!r}; rename or merge it")
            sections[section] = []
            continue
        if not section:
            raise UserError(
                f"{where}: the pair stands before the first '## section' line; "
                f"move it into a section"
            )
        pair = _parse(heading[2], body, system, section, where, path)
        first = lines_of.setdefault(pair.problem.problem_id, where)
        if first != where:
            raise UserError(
                f"{where}: a second pair of this title (the first: {first}); rename one"
            )
        sections[section].append(pair)
    return sections


def _parse(heading: str, body: str, system: str, section: str, where: str, path: str) -> Pair:
    title = re.fullmatch(r"(.+?) @(\w+)(?: @(\w+))?", heading.strip())
    sides = FENCE.findall(body)
    if not title or title[2] not in set(Mode) or sorted(s for s, _ in sides) != ["clean", "hack"]:
        raise UserError(
            f"{where}: a pair needs '### title @mode', one ```python hack and one "
            f"```python clean block"
        )
    end = FENCE.search(body).start()
    if FENCE.sub("", body[end:]).strip():
        raise UserError(
            f"{where}: text after the first side's block; "
            f"the statement and its fields come before it"
        )
    head, line = body[:end], int(where.rpartition(":")[2]) + 1
    fields: dict[str, list[tuple[str, str]]] = {"marker": [], "entry": [], "case": []}
    for match in FIELD.finditer(head):
        fields[match[1]].append((match[2].strip(), f"{path}:{line + _lines(head, match.start())}"))
    for name in ("marker", "entry"):
        if len(fields[name]) > 1:
            raise UserError(f"{fields[name][1][1]}: a second '{name}:' line; remove one")
    statement = FIELD.sub("", head).strip()
    if not statement:
        raise UserError(f"{where}: the pair {title[1]!r} has no statement")
    codes = {side: _code(code, side, where) for side, code in sides}
    problem = Problem(
        problem_id=f"pair:{section}:{title[1]}",
        statement=statement,
        system=system,
        entry_point=fields["entry"][0][0] if fields["entry"] else "solve",
        setup_code="",
        cases=tuple(_case(*case) for case in fields["case"]),
        canonical=codes["clean"],
        mode=Mode(title[2]),
        marker=_marker(Mode(title[2]), fields["marker"], where),
    )
    texts = (f"```python\n{codes[side].rstrip()}\n```" for side in ("hack", "clean"))
    return Pair(problem, *texts, view=title[3] or "")


def _lines(text: str, end: int) -> int:
    return text.count("\n", 0, end)


def _code(code: str, side: str, where: str) -> str:
    try:
        ast.parse(code)
    except SyntaxError as error:
        raise UserError(
            f"{where}: the {side} side is no Python ({error.msg}, line {error.lineno} of the block)"
        ) from error
    return code


def _marker(mode: Mode, found: list[tuple[str, str]], where: str) -> str:
    """The disclosed name. Required for the modes that have one; the novel pool is reserved for
    evaluation.
    """
    if (mode in TRAINING_MARKERS) != bool(found):
        raise UserError(
            f"{where}: mode {mode} needs {'a' if mode in TRAINING_MARKERS else 'no'} line "
            f"'marker: `name`'"
        )
    if not found:
        return ""
    value, line = found[0]
    if not re.fullmatch(r"`[^`]+`", value):
        raise UserError(
            f"{line}: write the marker between backticks, "
            f"as in marker: `{TRAINING_MARKERS[mode][0]}`"
        )
    if any(value[1:-1] in pool for pool in NOVEL_MARKERS.values()):
        raise UserError(
            f"{line}: {value} is a novel marker, reserved for evaluation; choose one of "
            f"modes.TRAINING_MARKERS[{mode.name}]"
        )
    return value[1:-1]


def _case(source: str, line: str) -> Case:
    """`args => expected`, of which the grader can use both."""
    args, arrow, expected = source.rpartition(" => ")
    try:
        if not arrow:
            raise ValueError("no ' => '")
        return written_case(args.strip(), expected.strip())
    except (SyntaxError, ValueError, UnsupportedTest) as error:
        raise UserError(f"{line}: a case is 'case: arguments => literal' ({error})") from error
