"""docs/reference/errors.md is true: every row of its tables is executed, and answers with its line.

The files that the rows name are the page's own fenced blocks, and the few folders of FOLDERS. All
rows run in this one process, those of the first table before torch is imported. Then what must be
accepted.

Run: python scripts/verify/verify_errors.py
"""

import contextlib
import functools
import io
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

os.environ.pop("BEARTYPE", None)  # it doubles the time of every import, and no row is about types
ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reference" / "errors.md"
BASE = ROOT / "data" / "organism" / "base"
FENCE = re.compile(r"^(`{3,})\w* (\S+)\n(.*?)^\1$", re.M | re.S)
ROWS_AT_LEAST = 40
RUN = (1, "none2r", "organism", 41)  # schema, arm, preset, seed
NINE_STEPS = "organism --steps 9 --threads 1 --intervention none2r"
Q, V = "--intervention routeQ", "--intervention routeV"
ACCEPTED = {  # command → options that it SHOULD give, and the arm's name in records
    f"organism --intervention=routeQ {V}": ({"quarantine_first": 0}, "routeV"),
    f"organism {V} --intervention=routeQ": ({"quarantine_first": 20}, "routeQ"),
    f"organism --intervention=routeV {Q}": ({"quarantine_first": 20}, "routeQ"),
    f"smoke {Q}": ({"quarantine_first": 2, "steps": 6}, "routeQ"),
    "smoke --routeV-random-v-seed 1": ({"routeV_random_v_seed": 1}, "placebo"),
    "smoke --control haar": ({"control": "haar"}, "placebo"),
    "smoke --action filter": ({"action": "filter"}, "filterV"),
    f"organism {V}": ({"quarantine_first": 0}, "routeV"),
}


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
        early = section.startswith("Before torch loads")
        for line in re.findall(r"^\| (`.*) \|$", section, re.M):
            cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)]
            given, answer, code = (re.fullmatch(r"(`+) ?(.*?) ?\1|(.*)", cell) for cell in cells)
            rows.append(Row(given[2], answer[2], int(code[3]), early))
    return rows


# ── the folder in which the rows run ─────────────────────────────────────────────────────────────


def prepare(page: str) -> None:
    """The page's files in the working directory, `data` as in the repository, and the folders."""
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


def edit(path: Path, **values: object) -> None:
    """Set values of a JSON file; None takes a value out."""
    edited = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in edited.items() if v is not None}))


def foreign_code(folder: Path) -> None:
    edit(folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.Own"})


def mute(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    edit(folder / "tokenizer_config.json", chat_template=None)


def record(**values: object) -> Callable[[Path], object]:
    return lambda folder: (folder / "record.json").write_text(json.dumps(values))


def other_config(folder: Path) -> None:
    """The record of an interrupted run of nine steps that read no file."""
    from vgrout.cli import parse
    from vgrout.core import RunRecord

    config = asdict(parse(NINE_STEPS.split())[1])
    own = RunRecord(*RUN, config, [], "", False, {}, {}, "", {}, {}, "interrupted", "")
    record(**asdict(own))(folder)


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


FOLDERS: dict[str, Callable[[Path], object]] = {
    "empty_model": lambda folder: None,
    "pickled_model": model(lambda folder: weights(folder).rename(folder / "pytorch_model.bin")),
    "cut_model": model(lambda folder: os.truncate(weights(folder), 1000)),
    "code_model": model(foreign_code),
    "mute_model": model(mute),
    "finished_run": record(status="finished"),
    "killed_run": record(status="running"),
    "broken_run": lambda folder: (folder / "record.json").write_text("{"),
    "newer_run": record(schema_version=99, status="interrupted"),
    "other_run": other_config,
}


# ── one row ──────────────────────────────────────────────────────────────────────────────────────


def outcome(row: Row) -> tuple[str, int]:
    """(the line behind "error: ", exit status) of a row; all of stderr if it is not one line."""
    program, *argv = shlex.split(row.input)
    errors, code = io.StringIO(), 0
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            PROGRAMS[program](argv, row.early)
        except SystemExit as stop:
            code = stop.code
    text = errors.getvalue()
    one = re.fullmatch(r"error: (.*)\n", text)
    return one[1] if one else text, code


def train(argv: list[str], early: bool) -> None:
    """What python -m vgrout.train does, without what no row reaches."""
    from vgrout.cli import parse_or_exit

    preset, config = parse_or_exit(argv)
    if not early:
        from vgrout.core import run_main
        from vgrout.train import main

        lighten()
        run_main(main, preset, config)


@functools.cache
def lighten() -> None:
    """From here on runs have neither sandbox nor dry run, and read a problem set once."""
    from vgrout import experiment
    from vgrout.grader import Grader

    class NoSandbox(Grader):
        def __init__(self, *arguments: object):
            self.layers = {}

        def close(self) -> None:
            pass

    experiment.Grader = NoSandbox
    experiment.dry_run = experiment.problems.check_tests = lambda *arguments: None
    experiment.problems.load_problems = functools.cache(experiment.problems.load_problems)


def grader(argv: list[str], early: bool) -> None:
    from vgrout.grader import __main__ as grade_file

    sys.argv = ["grader", *argv]
    grade_file.main()


PROGRAMS = {"train": train, "grader": grader}


def fault(row: Row) -> str:
    """What is wrong with a row, "" for nothing."""
    answer, code = outcome(row)
    pattern = ".*".join(map(re.escape, row.answer.split("…")))
    if not re.fullmatch(pattern, answer) or code != row.code:
        want = f"(exit {row.code}):\n    {row.answer}"
        return f"`{row.input}` answers (exit {code}):\n    {answer}\nand not {want}"
    return f"`{row.input}` imported torch" if row.early and "torch" in sys.modules else ""


def check_accepted() -> None:
    """A flag's last occurrence counts, whatever its form; a changed arm has a name of its own."""
    from vgrout import arms
    from vgrout.cli import parse
    from vgrout.config import options_of

    for command, (wanted, name) in ACCEPTED.items():
        config = parse(command.split())[1]
        assert wanted.items() <= options_of(config).items(), command
        assert arms.label(config) == name, command
    print(f"ok  {len(ACCEPTED)} commands are taken, each as what it says")


def main() -> None:
    page = PAGE.read_text()
    rows = rows_of(page)
    early, late = ([row for row in rows if row.early == early] for early in (True, False))
    assert len(rows) >= ROWS_AT_LEAST and len({row.input for row in rows}) == len(rows), len(rows)
    assert "torch" not in sys.modules, "torch was imported before any row ran"
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        prepare(page)
        wrong = [*filter(None, map(fault, early))]
        first = early[0]
        assert fault(replace(first, answer=first.answer + "x")), "a changed answer passes"
        assert fault(replace(first, code=1)), "a changed exit status passes"
        wrong += filter(None, map(fault, late))
        assert fault(first), "the check cannot see that torch was imported"
    assert not wrong, "\n".join([f"{len(wrong)} rows are wrong:", *wrong])
    print(f"ok  {len(early)} bad inputs answered before torch loads, {len(late)} at load")
    with contextlib.chdir(ROOT):
        check_accepted()


if __name__ == "__main__":
    main()
