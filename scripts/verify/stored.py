"""Runs for gates: trained at tiny size, or planted; and bad input that is refused."""

import contextlib
import io
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vgrout.core import EvalResult, RunRecord, UserError
from vgrout.run.provenance import provenance
from vgrout.run.records import Run


def captured(work: Callable, *arguments: Any) -> str:
    """What a call prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        work(*arguments)
    return out.getvalue()


def answer(work: Callable, *arguments: Any) -> str:
    """The one line with which a call is refused; "" where it is accepted."""
    try:
        captured(work, *arguments)
    except UserError as error:
        assert "\n" not in str(error), error
        return str(error)
    return ""


def refused(words: str, work: Callable, *arguments: Any) -> None:
    """Assert that a call answers with one line that holds `words`."""
    line = answer(work, *arguments)
    assert line and words in line, f"{line!r} SHOULD hold {words!r}"


def in_fork(body: Callable, *arguments: Any) -> int:
    """Exit code of a call in a forked process: negative for a signal, 2 for a UserError."""
    if (pid := os.fork()) == 0:
        try:
            body(*arguments)
            os._exit(0)
        except UserError:
            os._exit(2)
        except BaseException:
            traceback.print_exc()
            os._exit(3)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def trained(folder: Path, flags: str) -> Path:
    """A run of the smoke preset."""
    from vgrout import train  # here: planted runs need neither models nor a command line
    from vgrout.cli import parse

    words = ["smoke", "--out-dir", str(folder), "--threads", "1", "--workers", "1"]
    captured(train.main, *parse([*words, *flags.split()]))
    return folder


def novel_cell(step: int, hack: int, solve: int, n: int = 4) -> EvalResult:
    """A test cell of the deployed policy, with novel markers, on one problem."""
    by_mode = {"sentinel": {"n": n, "hack": hack, "solve": solve}}
    counts = {"p": [n, hack, solve]}
    return EvalResult("test", "novel", "deployed", step, n, hack, solve, by_mode, counts)


def planted_record(**changes: Any) -> RunRecord:
    """A record of a run of routeV, seed 41."""
    facts = {
        "schema_version": 1,
        "arm": "routeV",
        "preset": "smoke",
        "seed": 41,
        "config": {},
        "data_hashes": {},
        "pair_hash": "",
        "split_hashes": {},
        "sandbox_layers": {},
        "status": "running",
        "notes": {"oracle": False, "deployed": "ablated"},
    }
    return RunRecord(**facts | provenance() | changes)


@contextlib.contextmanager
def planted_run(folder: Path, record: RunRecord):
    """A run directory that is finished on leaving."""
    run = Run.create(folder, record, resume=False)
    yield run
    run.finish("finished")
    run.close()
