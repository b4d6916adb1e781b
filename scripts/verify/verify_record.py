"""A record can be trusted and repeated: its adapter gives its counts, its config gives its command.

With run directories: evaluate each saved adapter again (the base and the 2×2 table, the record's
own draws) and compare the counts, to the last completion. Equal on the machine and device type that
made the run; another may round differently. Without: train a tiny run, verify it, and see that a
changed count, a changed adapter and another data file are noticed.

Run: python scripts/verify/verify_record.py [RUN …]
"""

import contextlib
import io
import json
import shlex
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from scripts.experiments.reopen import reopen

from vgrout import arms, train
from vgrout.cli import parse
from vgrout.config import PRESETS
from vgrout.core import EvalResult, RunRecord, UserError, run_main
from vgrout.files import pack
from vgrout.grader import Grader
from vgrout.run.evaluate import Evaluations
from vgrout.run.records import Run, load_adapter, load_record
from vgrout.run.repeat import argv_of, config_of
from vgrout.run.runlog import last_cells

TINY = (
    "smoke --intervention none2r --steps 2 --num-prompts 2 --num-generations 4 --threads 1 "
    "--max-completion-length 96 --teacher-until 9 --final-draws 16 --save-every 0 --workers 1 "
    "--warmup-steps 0 --learning-rate 1e-4"
).split()
VALUES = (  # one of every kind
    "--modes run_tests sentinel --teacher-modes sentinel --pair-modes run_tests --beta 0 --signed "
    "--no-share-prompts --learning-rate 1e-5 --targets q_proj|v_proj --routeV-random-v-seed 3 "
    "--out-dir somewhere --teacher-until 3"
).split()
COMMANDS = (
    [],
    VALUES,
    ["--intervention", "routeA", "--act-space", "residual", "--act-layer", "2"],
    ["--intervention", "routeQ", "--quarantine-first", "3", "--no-phase-pays"],
    ["--intervention", "oracle", "--oracle-modes", "run_tests", "--teacher-pool", ""],
)


class Unrecorded(Run):
    """Stands where an evaluation would write; keeps nothing."""

    def __init__(self, record: RunRecord):
        self.record, self.step_seconds = record, {}

    def save(self) -> None:
        pass

    def log_evals(self, rows: list[dict]) -> None:
        pass


def again(path: Path) -> Iterator[tuple[EvalResult, EvalResult]]:
    """(recorded, evaluated now) for the base and every cell of the last evaluation."""
    stored = reopen(path)
    config, empty = stored.config, Unrecorded(replace(stored.record, evals=[]))
    deployed = arms.deployed_state(config)
    with Grader(config.run.workers) as grader:
        parts = (stored.policy, stored.splits, grader, config, deployed)
        evaluations = Evaluations(empty, *parts)
        for cell in last_cells(stored.record):
            stored.load(stored.base if cell.step == 0 else None)
            ablated = cell.state == "ablated" or (cell.state, deployed) == ("deployed", "ablated")
            if cell.step == 0:
                evaluations.base()
                yield cell, empty.record.evals[-1]
            else:
                where = (cell.split, cell.markers, cell.state, ablated, cell.step)
                yield cell, evaluations.cell(*where, config.run.final_draws)


def verify(path: Path) -> bool:
    """Print one line for each cell; True if all counts are equal."""
    cells, record = [*again(path)], load_record(path)
    for then, now in cells:
        name = f"step {then.step} {then.state} {then.markers}"
        counts = [f"hack {c.hack} solve {c.solve} of {c.n}" for c in (then, now)]
        print(
            f"ok {name}: {counts[0]}" if then == now else f"DIFFERS {name}: {', now '.join(counts)}"
        )
    command = argv_of(record.preset, config_of(record.preset, record.config))
    print("command: python -m vgrout.train", shlex.join(command))
    return all(then == now for then, now in cells)


# ── the check of the check ───────────────────────────────────────────────────────────────────────


def check_mutations(path: Path) -> None:
    assert verify(path), "a fresh run does not repeat"
    file, adapter = path / "record.json", path / "adapter.safetensors"
    record = json.loads(file.read_text())
    *others, cell = record["evals"]
    tensors, metadata = load_adapter(path)
    noise = torch.Generator().manual_seed(0)
    moved = {
        k: v + 0.3 * torch.randn(v.shape, generator=noise) if ".dA" in k else v
        for k, v in tensors.items()
    }
    with contextlib.redirect_stdout(io.StringIO()):
        changed = others + [cell | {"hack": cell["hack"] + 1}]
        file.write_text(json.dumps(record | {"evals": changed}))
        assert not verify(path), "a changed count goes unnoticed"
        file.write_text(json.dumps(record))
        adapter.write_bytes(pack(moved, metadata))
        assert not verify(path), "another adapter goes unnoticed"
    hashes = dict.fromkeys(record["data_hashes"], "0")
    file.write_text(json.dumps(record | {"data_hashes": hashes}))
    try:
        verify(path)
        raise AssertionError("another data file goes unnoticed")
    except UserError as error:
        assert "check out" in str(error), error
    print("ok  a finished run's counts repeat; a changed count, adapter or data file is noticed")


def check_commands() -> None:
    """Config → record.json → Config → command line → Config."""
    tried = 0
    for preset in ("smoke", "organism"):
        for command in COMMANDS:
            config = parse([preset, *command])[1]
            stored = json.loads(json.dumps(asdict(config)))
            assert config_of(preset, stored) == config, (preset, command)
            assert parse(argv_of(preset, config))[1] == config, argv_of(preset, config)
            tried += 1
    assert stored["model"].pop("score_dtype") == "auto"
    assert config_of(preset, stored).model.score_dtype == "float32", "an older record"
    assert len(argv_of("smoke", parse(["smoke", *VALUES])[1])) > len(VALUES) - 2
    assert argv_of("smoke", PRESETS["smoke"]) == ["smoke"]
    stored["grpo"]["zap"] = stored["grpo"].pop("beta")
    try:
        config_of(preset, stored)
        raise AssertionError("an unknown field was accepted")
    except UserError as error:
        assert "option zap" in str(error), error
    print(
        f"ok  {tried} configs come back from a record and from a command; an unknown field does not"
    )


def main(runs: list[str]) -> int:
    torch.set_num_threads(1)
    if runs:
        return int(not all([verify(Path(run)) for run in runs]))
    check_commands()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        with contextlib.redirect_stdout(io.StringIO()):
            train.main(*parse([*TINY, "--out-dir", str(path)]))
        check_mutations(path)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
