"""What all readers of runs share: which runs, numbers as text, tables on screen and as CSV."""

import argparse
import re
from pathlib import Path
from typing import Any

import polars as pl
from tabulate import tabulate

from vgrout.core import UserError

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "out"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # C0 and C1, but tab and line feed


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser that is described by the first line of a docstring."""
    first = (doc or "").splitlines()[0]
    return argparse.ArgumentParser(description=first)


def add_runs(command: argparse.ArgumentParser, out: Path, every: bool = False) -> None:
    """Add `runs` and `--out`; with `every`, no run named stands for all of out/runs."""
    named = "run directories"
    many = "+"
    if every:
        named += " (default: all of out/runs)"
        many = "*"
    where = f"default: {out.relative_to(ROOT)}"
    command.add_argument("runs", nargs=many, type=Path, help=named)
    command.add_argument("--out", type=Path, default=out, help=where)


def run_folders(named: list[Path]) -> list[Path]:
    """The named run directories, or all of out/runs; UserError where there is none."""
    stored = (OUT / "runs").glob("*/record.json")
    folders = named or sorted(path.parent for path in stored)
    if not folders:
        raise UserError("out/runs holds no run: start with `just demo`, or name run directories")
    return folders


def text(value: Any, digits: int = 3) -> str:
    """A cell of a table: what does not exist (None, NaN) is a dash."""
    if value is None or value != value:
        return "–"
    if isinstance(value, float):
        return f"{value:.{digits}f}"
    return str(value)


def table(rows: list[list], headers: list[str], style: str = "simple") -> str:
    """Rows as text; `style` is one of tabulate's formats."""
    how = {"tablefmt": style, "disable_numparse": True}
    return tabulate(rows, headers=headers, **how)


def write_csv(rows: list[dict], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    frame = pl.DataFrame(rows, infer_schema_length=None)
    frame.write_csv(path)


def show(rows: list[dict], path: Path) -> None:
    """Print rows and write them as CSV, the counts by problem left out."""
    keys = dict.fromkeys(key for row in rows for key in row)
    keys.pop("by_problem", None)
    plain = [{key: row.get(key) for key in keys} for row in rows]
    write_csv(plain, path)
    cells = [[*map(text, row.values())] for row in plain]
    print(table(cells, [*keys]), flush=True)


def visible(raw: str) -> str:
    r"""Text that moves no cursor and changes no colour: control characters as \xNN."""
    return CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", raw)
