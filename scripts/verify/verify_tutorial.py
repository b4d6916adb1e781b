"""The tutorial works: its blocks are applied to a copy of the package, and its checks run there.

Every section adds fewer than 30 lines in at most two files, a mode in three. With its last block
left out, its
check fails.

    uv run python scripts/verify/verify_tutorial.py
"""

import os
import re
import runpy
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

from scripts.verify.stored import in_fork

from vgrout import train  # noqa: F401  (torch and what it needs are read once, for all forks)

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reference" / "tutorial.md"
SECTIONS = ["An arm", "An action", "A mode", "A score", "A rung"]
LINES = 30
FILES = {"A mode": 3}
EDIT = re.compile(  # where, the line there begins with, file, text
    r"(after|before|instead of)\s+the\s+line\s+`([^`]+)`:\s*^```\w+ edit (\S+)\n(.*?)^```$",
    re.M | re.S,
)
CHECK = re.compile(r"^```(\w+) check\n(.*?)^```$", re.M | re.S)


def apply(root: Path, where: str, anchor: str, file: str, text: str) -> None:
    path = root / file
    lines = path.read_text().splitlines(keepends=True)
    places = [i for i, line in enumerate(lines) if line.startswith(anchor)]
    assert len(places) == 1, f"{file}: {len(places)} lines begin with {anchor!r}, SHOULD be one"
    start = places[0] + (where == "after")
    end = places[0] + (where != "before")
    lines[start:end] = [text]
    path.write_text("".join(lines))


def failure(root: Path, checks: list[tuple[str, str]]) -> str:
    """The last line of what the first check that fails says; "" if none does."""
    log = root / "log"
    for check in checks:
        if in_fork(run, root, log, *check):
            return log.read_text().strip().splitlines()[-1]
    return ""


def run(root: Path, log: Path, language: str, text: str) -> None:
    """Run a check in this process with the package of `root` in place of the present one."""
    os.chdir(root)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    for name in [*sys.modules]:
        if name.partition(".")[0] == "vgrout":
            del sys.modules[name]
    sys.meta_path[:] = [f for f in sys.meta_path if "jaxtyping" not in type(f).__module__]
    os.environ.pop("BEARTYPE", None)  # it doubles the time of every import
    sys.path.insert(0, str(root / "src"))
    if language == "sh":
        words = [word for word in shlex.split(text) if word.strip()]
        sys.argv[1:] = words[3:]
        runpy.run_module(words[2], run_name="__main__", alter_sys=True)
    else:
        exec(text, {"__name__": "__main__"})


def main() -> None:
    _, *sections = re.split(r"^## \d+\. ", PAGE.read_text(), flags=re.M)
    titles = [section.partition("\n")[0] for section in sections]
    assert titles == SECTIONS, titles
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        no_cache = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "src", root / "src", ignore=no_cache)
        (root / "data").symlink_to(ROOT / "data")
        for title, section in zip(SECTIONS, sections):
            edits = EDIT.findall(section)
            checks = CHECK.findall(section)
            assert len(edits) == section.count(" edit src/"), f"{title}: a block without a place"
            added = "".join(text for *_, text in edits)
            lines = sum(bool(line.strip()) for line in added.splitlines())
            files = sorted({file for _, _, file, _ in edits})
            assert 0 < lines < LINES, f"{title}: {lines} lines"
            assert len(files) <= FILES.get(title, 2), f"{title}: {files}"
            for edit in edits[:-1]:
                apply(root, *edit)
            assert failure(root, checks), f"{title}: the check passes without the last block"
            apply(root, *edits[-1])
            said = failure(root, checks)
            assert not said, f"{title}: {said}"
            print(f"ok  {title}: {lines} lines in {' and '.join(files)}, and its check passes")
    print("ok  with its last block left out, the check of each section fails")


if __name__ == "__main__":
    main()
