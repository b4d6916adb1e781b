"""What the documents name exists, their tables are the records', their prose keeps to the rules.

A rule finds what is wrong in a page. It must find nothing in the documents, and what is planted.

    uv run python scripts/verify/verify_docs.py
"""

import re
from collections import defaultdict
from functools import cache
from math import nan
from pathlib import Path
from statistics import mean

from scripts.experiments import records

from vgrout.core import EvalResult, RunRecord

ROOT = Path(__file__).resolve().parents[2]
FENCE = r"^(?:`{4}[^`].*?^`{4}|```[^`].*?^```)$"
CODE = re.compile(rf"{FENCE}|`[^`\n]+`", re.S | re.M)
MADE = r"<!-- [^\n]*-->\n.*?<!-- (?:\w+:)?end -->"  # by a program
NO_PROSE = re.compile(rf"{FENCE}|{MADE}|^\|[^\n]*$", re.S | re.M)
LINK = re.compile(r"!?\[([^\]]*)\]\(([^)\s]+)\)")
NAME = re.compile(  # a recipe, a module, a flag, a path, a source file
    r"(?:^|(?<=uv run )|(?<=&& ))just [a-z][\w-]*(?! \w+\.)"
    r"|(?<=python -m )vgrout[\w.]*\w|(?<![\w-])--[a-zA-Z][\w-]*"
    r"|(?<![\w./<-])(?:src|scripts|docs|data)/[\w./*-]*\w|(?<![\w./<*-])[\w/-]+\.py\b",
    re.M,
)
OTHERS = {"--extra", "--list", "--in-place", "--help", "--include", "eval.py", "chat_rl.py"}
ABSENT = ("data/leetcode", "data/none", "data/organism/teacher.jsonl.gz/")  # downloaded, refused
HISTORY = ("RESEARCH_JOURNAL.md", "docs/spec/", "docs/plans/")  # its words stay as they are
NEWCOMERS = ("README.md", "docs/start.md", "docs/findings/")
BOUNDED = ("README.md", "docs/method/")
FIGURES = ("seeds", "hack", "solve")


def broken_links(name: str, text: str) -> list[str]:
    """Relative links lead to a file, and to a heading where they name one."""
    links = [link for _, link in LINK.findall(CODE.sub("", text)) if ":" not in link]
    return [link for link in links if not leads(link, ROOT / name)]


def leads(link: str, page: Path) -> bool:
    target, _, anchor = link.partition("#")
    page = (page.parent / target).resolve() if target else page
    if not page.exists() or not anchor:
        return page.exists()
    titles = re.findall(r"^#+ (.+)$", page.read_text().lower(), re.M)
    return anchor in [re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles]


def unknown_names(name: str, text: str) -> list[str]:
    """Recipes, modules, flags, paths and source files that code names are there."""
    code = "\n".join(match[0].strip("`") for match in CODE.finditer(text))
    if name.endswith("errors.md"):  # it quotes flags that are refused
        code = re.sub(r"--[\w-]+", "", code)
    named = [] if name.startswith(HISTORY) else NAME.findall(code)
    return [each for each in named if each not in OTHERS and not is_there(each)]


@cache
def is_there(name: str) -> bool:
    if name.startswith("just "):
        return bool(re.search(rf"^{name[5:]}( .*)?:", sources(), re.M))
    if name.startswith("--"):
        field = name[2:].removeprefix("no-").replace("-", "_")
        return bool(re.search(rf"{name}(?![\w-])|^    {field}: ", sources(), re.M))
    module = name.replace(".", "/")
    places = [
        name,
        f"src/**/{name}",
        f"scripts/**/{name}",
        f"src/{module}",
        f"src/{module}.py",
    ]
    return name.startswith(ABSENT) or any(any(ROOT.glob(place)) for place in places)


@cache
def sources() -> str:
    """All code but this file's, whose planted names are nowhere."""
    paths = {*ROOT.glob("src/**/*.py"), *ROOT.glob("scripts/**/*.py"), ROOT / "justfile"}
    return "\n".join(path.read_text() for path in paths - {Path(__file__).resolve()})


PAGE_OF_ROW = re.compile(r"\]\(docs/findings/(\w+)\.md\)")


def stale_figures(name: str, text: str) -> list[str]:
    """Seeds, hack and solve of a row that a table names are those of the records."""
    wrong = []
    head = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        head = (head or cells) if line.startswith("|") else []
        shown = dict(zip(head, cells))
        row = re.match(r"`(\w+)`", cells[1]) if "seeds" in shown else None
        for what in {*FIGURES} & {*shown} if row else ():
            page = PAGE_OF_ROW.search(line)  # a row may name the wave that it is of
            figure = committed(page[1] if page else Path(name).stem)[row[1]][what]
            digits = len(shown[what].partition(".")[2])
            if float(shown[what]) != round(figure, digits):
                wrong.append(f"{row[1]}, {what} {shown[what]}: the records say {figure:.4g}")
    return wrong


@cache
def committed(page: str) -> dict[str, dict[str, float]]:
    """Row → its figures: the last deployed cell with novel markers, mean over seeds.

    Of the wave that the page is named after, else of the decision.
    """
    wave = sorted(records.RECORDS.glob(f"*_{page}.jsonl"))
    runs, _ = records.load(wave or records.files("decision"))
    runs["absorb"] = runs.get("none2r", {})  # trained once, evaluated twice
    found = defaultdict(lambda: dict.fromkeys(FIGURES, nan))
    for row, seeds in runs.items():
        state = "ablated" if row == "absorb" else "deployed"
        cells = [last(record, state) for record in seeds.values()]
        if not cells:
            continue
        rates = {what: mean(getattr(c, what) / c.n for c in cells) for what in ("hack", "solve")}
        found[row] = {"seeds": len(cells)} | rates
    return found


def last(record: RunRecord, state: str) -> EvalResult:
    """The last test cell of a state with novel markers."""
    wanted = ("test", "novel", state)
    cells = [c for c in record.evals if (c.split, c.markers, c.state) == wanted]
    return max(cells, key=lambda cell: cell.step)


def prose(text: str) -> str:
    return NO_PROSE.sub("", text)


def paragraphs(text: str) -> str:
    """A paragraph, list item or heading a line; a link is its text, and code is one word."""
    plain = CODE.sub("Code", LINK.sub(r"\1", NO_PROSE.sub("\n", text)))
    parts = re.split(r"\n\s*\n|\n(?= *(?:[-#]|\d+\.) )", plain)
    return "\n".join(" ".join(part.split()) for part in parts)


PROSE = {  # rule: where, in which view of the text, and the pattern of a fault
    "a line of more than 120 columns": ("", prose, r".{121}"),
    "a sentence of more than 40 words": (
        NEWCOMERS,
        paragraphs,
        r"(\S*[^\s.!?*]\** ){40}\S",
    ),
    "a paragraph of more than six numbers": (
        NEWCOMERS,
        paragraphs,
        r"((^|[^\w.,])\.?\d.*?){7}",
    ),
    "a page of more than 100 lines": (BOUNDED, str, r"(.*\n){101}"),
    "a word that the project avoids": (
        "",
        paragraphs,
        r"(?i)\b((dis)?honest\w*|ship(s|ped)|canary|knobs?|coin flips?|scoreboard|dies|lives"
        r"|lottery|folklore)\b",
    ),
}


def faulty_prose(name: str, text: str) -> list[str]:
    """The prose keeps to its rules."""
    found = []
    for rule, (places, view, fault) in PROSE.items():
        if name.startswith(places) and not name.startswith(HISTORY):
            faults = re.finditer(fault, view(text), re.M)
            found += [f"{rule}: {match[0][:60]}" for match in faults]
    return found


RULES = {  # rule → a text in which it must find something, and how often
    broken_links: ("see [this](docs/no_such_page.md) and [that](AGENTS.md#no-such-heading)", 2),
    unknown_names: ("`just no`, `python -m vgrout.no`, `scripts/no.py`, `no.py`, `--no-no`", 5),
    stale_figures: ("| row | seeds | hack |\n|---|---|---|\n| `none2r` | 5 | .79 |", 1),
    faulty_prose: ("1, .2, 3, 4, 5, 6, 7\n\nIt lives.\n\n" + "Word " * 41 + "\n" * 101, 5),
}


def main() -> None:
    failures = 0
    paths = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
    pages = {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}
    for rule, (planted, times) in RULES.items():
        assert len(rule("README.md", planted)) == times, f"{rule.__name__} misses a planted fault"
        wrong = [f"{name}: {fault}" for name, text in pages.items() for fault in rule(name, text)]
        failures += len(wrong)
        print(f"{'BROKEN' if wrong else 'ok':6}  {rule.__doc__}", *wrong, sep="\n        ")
    assert not failures, f"{failures} faults in the documents"
    print(f"ok      {len(pages)} documents; a planted fault of each kind is found")


if __name__ == "__main__":
    main()
