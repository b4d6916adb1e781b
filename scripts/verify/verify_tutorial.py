"""The tutorial works: its blocks are applied to a copy of the package, and its checks run there.

Every section adds fewer than 30 lines in at most two files, a mode in three. With its last block left out, its
check fails.

    uv run python scripts/verify/verify_tutorial.py
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reference" / "tutorial.md"
SECTIONS = ["An arm", "An action", "A mode", "A score", "A rung"]
LINES, FILES = 30, {"A mode": 3}
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
    environment = {"PYTHONPATH": str(root / "src"), "BEARTYPE": "1", "OMP_NUM_THREADS": "1"}
    for language, text in checks:
        words = shlex.split(text)[1:] if language == "sh" else ["-c", text]
        words = [word for word in words if word.strip()]
        done = subprocess.run(
            [sys.executable, *words],
            cwd=root,
            env=os.environ | environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            return (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
    return ""


def main() -> None:
    _, *sections = re.split(r"^## \d+\. ", PAGE.read_text(), flags=re.M)
    assert [section.partition("\n")[0] for section in sections] == SECTIONS, "sections are missing"
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        no_cache = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "src", root / "src", ignore=no_cache)
        (root / "data").symlink_to(ROOT / "data")
        for title, section in zip(SECTIONS, sections):
            edits, checks = EDIT.findall(section), CHECK.findall(section)
            assert len(edits) == section.count(" edit src/"), f"{title}: a block without a place"
            lines = sum(bool(line.strip()) for *_, text in edits for line in text.splitlines())
            files = sorted({file for _, _, file, _ in edits})
            assert 0 < lines < LINES and len(files) <= FILES.get(title, 2), (
                f"{title}: {lines} lines in {files}"
            )
            for edit in edits[:-1]:
                apply(root, *edit)
            assert failure(root, checks), f"{title}: the check passes without the last block"
            apply(root, *edits[-1])
            assert not (said := failure(root, checks)), f"{title}: {said}"
            print(f"ok  {title}: {lines} lines in {' and '.join(files)}, and its check passes")
    print("ok  with its last block left out, the check of each section fails")


if __name__ == "__main__":
    main()
