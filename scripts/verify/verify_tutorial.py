"""docs/tutorial.md works: its blocks are applied to a copy of the package, in order, and its checks run there.

Every section adds fewer than 30 lines in at most two files; with one of its blocks left out, a section's check fails.

    uv run python scripts/verify/verify_tutorial.py
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINES, FILES = 30, 2
FENCE = re.compile(r"^```(\w+) (edit|check) ?(\S*)\n(.*?)^```$", re.M | re.S)
PLACE = re.compile(
    r"(after|before|instead of)\s+the\s+line\s+`([^`]+)`:\s*\Z|(at\s+the\s+end):\s*\Z"
)


@dataclass(frozen=True)
class Block:
    """One fenced block: a check to run, or an edit with its file, its place and the line that it stands by."""

    language: str
    verb: str  # edit | check
    file: str
    text: str
    place: str = ""  # after | before | instead of | at the end
    anchor: str = ""  # how that line begins


def sections(text: str) -> dict[str, list[Block]]:
    found: dict[str, list[Block]] = {}
    for part in re.split(r"^## ", text, flags=re.M)[1:]:
        title, blocks = part.partition("\n")[0], []
        for fence in FENCE.finditer(part):
            where = PLACE.search(part[: fence.start()]) if fence[2] == "edit" else None
            assert fence[2] == "check" or where, (
                f"{title}: the text above a block for {fence[3]} does not say where it goes"
            )
            place, anchor = (where[1] or "at the end", where[2] or "") if where else ("", "")
            blocks.append(Block(fence[1], fence[2], fence[3], fence[4], place, anchor))
        found[title] = blocks
    return found


def apply(block: Block, root: Path) -> None:
    path = root / block.file
    lines = path.read_text().splitlines(keepends=True)
    if block.place == "at the end":
        path.write_text("".join([*lines, block.text]))
        return
    at = [i for i, line in enumerate(lines) if line.startswith(block.anchor)]
    assert len(at) == 1, f"{block.file}: {len(at)} lines begin with {block.anchor!r}, SHOULD be one"
    start, end = {
        "after": (at[0] + 1, at[0] + 1),
        "before": (at[0], at[0]),
        "instead of": (at[0], at[0] + 1),
    }[block.place]
    lines[start:end] = [block.text]
    path.write_text("".join(lines))


def check(block: Block, root: Path) -> str:
    """Run a check in the copy; "" if it passes, else the last line of what it said."""
    command = [sys.executable, "-c", block.text]
    if block.language == "sh":
        command = [
            sys.executable if word == "python" else word
            for word in shlex.split(block.text)
            if word.strip()
        ]
    environment = os.environ | {
        "PYTHONPATH": str(root / "src"),
        "BEARTYPE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    return (
        (done.stderr or done.stdout or f"exit status {done.returncode}").strip().splitlines()[-1]
        if done.returncode
        else ""
    )


def copy(folder: Path) -> Path:
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "justfile", folder)
    (folder / "data").symlink_to(ROOT / "data")
    return folder


def main() -> None:
    found = sections((ROOT / "docs" / "tutorial.md").read_text())
    assert [title.split()[-1] for title in found] == ["arm", "mode", "score"], list(found)
    with tempfile.TemporaryDirectory() as name:
        root = copy(Path(name))
        for title, blocks in found.items():
            edits = [block for block in blocks if block.verb == "edit"]
            lines = sum(bool(line.strip()) for block in edits for line in block.text.splitlines())
            files = sorted({block.file for block in edits})
            assert 0 < lines < LINES and len(files) <= FILES, f"{title}: {lines} lines in {files}"
            checks = [block for block in blocks if block.verb == "check"]
            if not any(
                block.language == "sh" for block in checks
            ):  # mutation, where it costs no run
                failed = [check(block, root) for block in checks]
                assert any(failed), f"{title}: the check passes without the addition"
            for block in edits:
                apply(block, root)
            for block in checks:
                assert not (said := check(block, root)), f"{title}: {said}"
            print(f"ok  {title}: {lines} lines in {' and '.join(files)}, and its check passes")
        recipes = subprocess.run([shutil.which("just") or str(Path(sys.executable).with_name("just")), "--summary"], cwd=root,
                                 capture_output=True, text=True)  # fmt: skip
        assert "advmodA_placebo" in recipes.stdout.split(), recipes.stderr
    half = [block for block in found["2. A mode"] if block.file != "src/vgrout/grader.py"]
    with tempfile.TemporaryDirectory() as name:
        root = copy(Path(name))
        for block in half[:-1]:
            apply(block, root)
        assert check(half[-1], root), "the check of the mode passes without its channel"
    print("ok  without the addition, or with the channel left out, the checks fail")


if __name__ == "__main__":
    main()
