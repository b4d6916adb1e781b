"""What the documents name exists: relative links and their headings, recipes, modules, scripts, source files, flags.

Each rule is a function from (document, text) to what is missing. It must find nothing in the documents, and what is planted.

    uv run python scripts/verify/verify_docs.py
"""

import re
import shutil
import subprocess
import sys
from dataclasses import fields
from functools import cache
from pathlib import Path

from scripts.analysis.results import with_tables

from vgrout.config import Config

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"```.*?```|`[^`\n]+`", re.S)
OTHERS_FLAGS = {"--extra", "--list", "--in-place", "--help", "--include"}  # of uv, just, pueue, hf
OTHERS_FILES = {"eval.py", "chat_rl.py"}


def documents() -> dict[Path, str]:
    """Every markdown file that people read, the pairs left out: their text is data."""
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    return {path: path.read_text() for path in sorted(found)}


def code_of(text: str) -> list[str]:
    """The text's code: fenced blocks and backticked words."""
    return [
        part[3:-3].partition("\n")[2] if part.startswith("```") else part.strip("`")
        for part in CODE.findall(text)
    ]


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def broken_links(path: Path, text: str) -> list[str]:
    """Relative links lead to a file, and to a heading where they name one."""
    missing = []
    for link in LINK.findall(CODE.sub("", text)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists():
            missing.append(link)
        elif anchor and target.suffix == ".md":
            if anchor not in map(
                slug, re.findall(r"^#+ (.+)$", target.read_text() if name else text, re.M)
            ):
                missing.append(link)
    return missing


@cache
def recipes() -> frozenset[str]:
    just = shutil.which("just") or str(Path(sys.executable).with_name("just"))
    return frozenset(
        subprocess.run(
            [just, "--summary"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
    )


def unknown_recipes(path: Path, text: str) -> list[str]:
    """`just NAME` in code names a recipe."""
    names = [
        name
        for code in code_of(text)
        for name in re.findall(r"(?:^|uv run |&& |\n)just ([a-z][\w-]*)", code)
    ]
    return [f"just {name}" for name in names if name not in recipes()]


def missing_files(path: Path, text: str) -> list[str]:
    """Modules, scripts and source files that code names are there."""
    homes = (ROOT, ROOT / "scripts", ROOT / "src" / "vgrout")
    found = []
    for code in code_of(text):
        modules = re.findall(r"python -m (vgrout\.\w+)", code)
        found += [
            name
            for name in modules
            if not (ROOT / "src" / (name.replace(".", "/") + ".py")).exists()
        ]
        files = re.findall(r"(?<![\w./<*])((?:[\w-]+/)*[\w-]+\.py)\b", code)
        found += [
            name
            for name in files
            if name not in OTHERS_FILES and not any((home / name).exists() for home in homes)
        ]
    return found


@cache
def flags() -> frozenset[str]:
    """Flags of training, of the scripts, and of the package's other command lines."""
    config = {
        f"--{f.name.replace('_', '-')}"
        for group in fields(Config)
        for f in fields(group.default_factory)
    }
    sources = [
        *(ROOT / "scripts").glob("*.py"),
        *(ROOT / "src" / "vgrout").glob("*.py"),
        ROOT / "justfile",
    ]
    texts = [path.read_text() for path in sources if path.name != Path(__file__).name]
    named = {flag for text in texts for flag in re.findall(r"--[a-zA-Z][\w-]*", text)}
    return frozenset(config | named | OTHERS_FLAGS)


def unknown_flags(path: Path, text: str) -> list[str]:
    """Flags that code names are known to some command line of the project."""
    if path.name == "errors.md":  # it quotes flags that are refused
        return []
    named = [
        flag for code in code_of(text) for flag in re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", code)
    ]
    return [flag for flag in named if flag not in flags()]


def stale_tables(path: Path, text: str) -> list[str]:
    """Tables of runs are those that the committed records give (`results.py --page`)."""
    return (
        []
        if "<!-- runs:" not in text or with_tables(text) == text
        else [f"python scripts/analysis/results.py --page {path.relative_to(ROOT)}"]
    )


RULES = {  # rule → a text in which it must find something
    broken_links: "see [this](docs/no_such_page.md) and [that](AGENTS.md#no-such-heading)",
    unknown_recipes: "run `uv run just no-such-recipe`",
    missing_files: "run `python -m vgrout.nothing` or `scripts/nothing.py`; `nothing.py` says more",
    stale_tables: "<!-- runs: docs/results/no_loophole_s41.json -->\n| none2r | .00 |\n<!-- end -->",
    unknown_flags: "add `--no-such-flag-at-all`",
}


def main() -> None:
    texts, failures = documents(), 0
    for rule, planted in RULES.items():
        missed = len(rule(ROOT / "README.md", planted))
        assert missed == {broken_links: 2, missing_files: 3}.get(rule, 1), (
            f"{rule.__name__} misses what is planted"
        )
        found = [
            f"{path.relative_to(ROOT)}: {what}"
            for path, text in texts.items()
            for what in rule(path, text)
        ]
        failures += len(found)
        print(f"{'BROKEN' if found else 'ok':6}  {rule.__doc__}", *found, sep="\n        ")
    assert not failures, f"{failures} things are named and not there"
    print(f"ok      {len(texts)} documents; a planted fault of each kind is found")


if __name__ == "__main__":
    main()
