"""docs/errors.md is true: every row of its tables is executed, and answers with that one line and that exit status.

The files that the rows name are the page's own fenced blocks, and the few folders that FOLDERS makes. All rows run in this one
process, those of the first table before torch is imported. A check of the check: a changed answer, exit status or promise fails.

Run: python scripts/verify/verify_errors.py
"""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.pop("BEARTYPE", None)  # it doubles the time of every import, and no row is about types
ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "errors.md"
BASE = ROOT / "data" / "organism" / "base"
FENCE = re.compile(r"^(`{3,})\w* (\S+)\n(.*?)^\1$", re.M | re.S)
ROWS_AT_LEAST = 40


@dataclass(frozen=True)
class Row:
    input: str  # `train …` is python -m vgrout.train …, `grader …` is python -m vgrout.grader …
    answer: str  # the line behind "error: "; … stands for any text
    code: int
    early: bool  # answered before torch is imported


def rows_of(page: str) -> list[Row]:
    """The rows of all tables; those under the heading "Before torch loads" promise just that."""
    rows = []
    for section in re.split(r"^## ", page, flags=re.M)[1:]:
        for line in re.findall(r"^\| (`.*) \|$", section, re.M):
            cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)]
            given, answer, code = (re.fullmatch(r"(`+) ?(.*?) ?\1|(.*)", cell) for cell in cells)
            rows.append(
                Row(given[2], answer[2], int(code[3]), section.startswith("Before torch loads"))
            )
    return rows


# ── the folder in which the rows run ─────────────────────────────────────────────────────────────────────────────


def prepare(page: str) -> None:
    """Write the page's files into the working directory, with `data` as in the repository, and make the folders."""
    os.symlink(ROOT / "data", "data")
    for _, name, text in FENCE.findall(page):
        Path(name).write_text(text)
    for name, make in FOLDERS.items():
        Path(name).mkdir()
        make(Path(name))


def model(change: Callable[[Path], object]) -> Callable[[Path], None]:
    """A copy of the organism's base with one change."""

    def make(folder: Path) -> None:
        shutil.copytree(BASE, folder, dirs_exist_ok=True)
        change(folder)

    return make


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def without_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def record(**values: object) -> Callable[[Path], None]:
    return lambda folder: (folder / "record.json").write_text(json.dumps(values)) and None


def other_config(folder: Path) -> None:
    """The record of an interrupted run of nine steps that read no file."""
    from vgrout.cli import parse
    from vgrout.core import RunRecord

    config = asdict(
        parse(["organism", "--steps", "9", "--threads", "1", "--intervention", "none2r"])[1]
    )
    own = RunRecord(
        1, "none2r", "organism", 41, config, [], "", False, {}, {}, "", {}, {}, "interrupted", ""
    )
    (folder / "record.json").write_text(json.dumps(asdict(own)))


FOLDERS: dict[str, Callable[[Path], object]] = {
    "empty_model": lambda folder: None,
    "pickled_model": model(
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    ),
    "cut_model": model(lambda folder: os.truncate(folder / "model.safetensors", 1000)),
    "code_model": model(
        lambda folder: edit_json(
            folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.Own"}
        )
    ),
    "mute_model": model(without_template),
    "finished_run": record(status="finished"),
    "killed_run": record(status="running"),
    "broken_run": lambda folder: (folder / "record.json").write_text("{"),
    "newer_run": record(schema_version=99, status="interrupted"),
    "other_run": other_config,
}


# ── one row ──────────────────────────────────────────────────────────────────────────────────────────────────────


def outcome(row: Row) -> tuple[str, int]:
    """(the line behind "error: ", exit status) of a row; the whole of stderr if it is not one such line."""
    program, *argv = shlex.split(row.input)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            PROGRAMS[program](argv, row.early)
        code = 0
    except SystemExit as stop:
        code = stop.code
    text = errors.getvalue()
    one = re.fullmatch(r"error: (.*)\n", text)
    return one[1] if one else text, code


def train(argv: list[str], early: bool) -> None:
    """What python -m vgrout.train does with these arguments, without a sandbox, which no row reaches."""
    from vgrout.cli import parse_or_exit

    preset, config = parse_or_exit(argv)
    if early:
        return
    from vgrout import train as module
    from vgrout.core import run_main
    from vgrout.grader import Grader

    class NoSandbox(Grader):
        def __init__(self, *arguments: object, **options: object):
            self.layers = {}

        def close(self) -> None:
            pass

    module.Grader = NoSandbox
    module.worst_case = lambda *arguments, **options: None
    run_main(module.main, preset, config)


def grader(argv: list[str], early: bool) -> None:
    from vgrout.grader import __main__ as grade_file

    sys.argv = ["grader", *argv]
    grade_file.main()


PROGRAMS = {"train": train, "grader": grader}


def holds(row: Row) -> str:
    """What is wrong with a row, "" for nothing."""
    answer, code = outcome(row)
    pattern = ".*".join(map(re.escape, row.answer.split("…")))
    if not re.fullmatch(pattern, answer) or code != row.code:
        return f"`{row.input}` answers (exit {code}):\n    {answer}\nand not (exit {row.code}):\n    {row.answer}"
    return f"`{row.input}` imported torch" if row.early and "torch" in sys.modules else ""


def main() -> None:
    page, began = PAGE.read_text(), time.perf_counter()
    rows = rows_of(page)
    early = [row for row in rows if row.early]
    assert len(rows) >= ROWS_AT_LEAST and len({row.input for row in rows}) == len(rows), (
        f"{len(rows)} rows"
    )
    assert "torch" not in sys.modules, "torch was imported before any row ran"
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        prepare(page)
        wrong = [fault for row in early if (fault := holds(row))]
        first = early[0]
        for mutant in (
            Row(first.input, first.answer + "x", first.code, True),
            Row(first.input, first.answer, 1, True),
        ):
            assert holds(mutant), "a changed row passes"
        if not wrong:
            print(
                f"ok  {len(early)} bad inputs are answered by their line before torch loads, {time.perf_counter() - began:.1f} s"
            )
        wrong += [fault for row in rows if not row.early and (fault := holds(row))]
        assert holds(first), "the check cannot see that torch was imported"
    assert not wrong, "\n".join([f"{len(wrong)} rows are wrong:", *wrong])
    print(
        f"ok  {len(rows) - len(early)} more at load; {len(rows)} rows, {time.perf_counter() - began:.1f} s in all"
    )


if __name__ == "__main__":
    main()
