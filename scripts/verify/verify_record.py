"""A record can be trusted and repeated: its adapter, evaluated again, gives its counts; its config gives its command.

With run directories: evaluate each saved adapter again (the base and the 2×2 table, the record's own draws) and compare the counts,
to the last completion. Equal on the machine and device type that made the run; another may round differently.
Without: train a tiny run, verify it, and see that a changed count, a changed adapter and another data file are noticed.

Run: python scripts/verify/verify_record.py [RUN …]
"""

import contextlib
import dataclasses
import io
import json
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from scripts.experiments.reopen import reopen

from vgrout import train
from vgrout.cli import parse
from vgrout.config import PRESETS, Config
from vgrout.core import EvalResult, RunRecord, UserError, run_main
from vgrout.files import pack
from vgrout.grader import Grader
from vgrout.run.records import load_adapter, load_record
from vgrout.run.repeat import argv_of, config_of
from vgrout.run.runlog import last_cells

TINY = ("smoke --steps 2 --num-prompts 2 --num-generations 4 --max-completion-length 96 --teacher-until 9 --final-draws 16 "
        "--save-every 0 --eval-every 0 --threads 1 --workers 1 "
        "--lr-schedule constant_with_warmup --warmup-steps 0 --learning-rate 1e-4").split()  # fmt: skip


class Unrecorded:
    """Stands where an evaluation would write; keeps nothing."""

    def __init__(self, record: RunRecord):
        self.record = record

    def spend(self, seconds: dict[str, float]) -> None:
        pass

    def save(self) -> None:
        pass

    def log_evals(self, rows: list[dict]) -> None:
        pass


def again(run: Path) -> Iterator[tuple[EvalResult, EvalResult]]:
    """(recorded, evaluated now) for the base and every cell of the last evaluation."""
    stored = reopen(run)
    with Grader(stored.config.run.workers) as grader:
        empty = Unrecorded(dataclasses.replace(stored.record, evals=[]))
        assess = train.Assess(
            empty, stored.policy, stored.splits, grader, stored.sampling, stored.arm, stored.config
        )
        for cell in last_cells(stored.record):
            stored.load(stored.base if cell.step == 0 else None)
            ablated = cell.state == "ablated" or (
                cell.state == "deployed" and stored.arm.deployed == "ablated"
            )
            ablated |= cell.step == 0 and not stored.config.model.init_from  # as `Assess.base`
            draws = stored.config.run.final_draws
            yield cell, assess.cell(cell.split, cell.markers, cell.state, ablated, cell.step, draws)


def verify(run: Path) -> bool:
    """Print one line for each cell; True if all counts are equal."""
    cells, record = list(again(run)), load_record(run)
    equal = [then == now for then, now in cells]
    for (then, now), same in zip(cells, equal):
        name = f"step {then.step} {then.state} {then.markers}"
        print(
            f"{'ok    ' if same else 'DIFFERS'} {name}: hack {then.hack} solve {then.solve} of {then.n}",
            end="",
        )
        print("" if same else f", now {now.hack} {now.solve} of {now.n}")
    print(
        "command: python -m vgrout.train",
        shlex.join(argv_of(record.preset, config_of(record.config))),
    )
    return all(equal)


# ── the check of the check ───────────────────────────────────────────────────────────────────────────────────────


def quietly(run: Path) -> bool:
    with contextlib.redirect_stdout(io.StringIO()):
        return verify(run)


def check_mutations(run: Path) -> None:
    assert verify(run), "a fresh run does not repeat"
    record = json.loads((run / "record.json").read_text())
    cell = record["evals"][-1]
    (run / "record.json").write_text(
        json.dumps(record | {"evals": [*record["evals"][:-1], cell | {"hack": cell["hack"] + 1}]})
    )
    assert not quietly(run), "a changed count goes unnoticed"
    (run / "record.json").write_text(json.dumps(record))
    tensors, metadata = load_adapter(run)
    moved = {
        k: v + 0.3 * torch.randn(v.shape, generator=torch.Generator().manual_seed(0))
        if ".dA" in k
        else v
        for k, v in tensors.items()
    }
    (run / "adapter.safetensors").write_bytes(pack(moved, metadata))
    assert not quietly(run), "another adapter goes unnoticed"
    data = dict.fromkeys(record["data_hashes"], "0")
    (run / "record.json").write_text(json.dumps(record | {"data_hashes": data}))
    try:
        quietly(run)
        raise AssertionError("another data file goes unnoticed")
    except UserError as error:
        assert "check out commit" in str(error)
    print("ok  a finished run's counts repeat; a changed count, adapter or data file is noticed")


def check_commands() -> None:
    """Config → record.json → Config → command line → Config, for every preset and a value of every kind."""
    flags = ("--modes run_tests sentinel --teacher-modes sentinel --pair-modes run_tests --learning-rate 1e-5 --beta 0 --signed "
             "--no-gradient-checkpointing --act-layer 2 --targets q_proj|v_proj --routeV-random-v-seed 3 --out-dir somewhere "
             "--teacher-until 3").split()  # fmt: skip
    for preset in PRESETS:
        for given in (
            [],
            flags,
            ["--intervention", "oracle", "--oracle-modes", "run_tests", "--teacher-pool", ""],
        ):
            with contextlib.suppress(UserError):  # a preset whose data or model is not here
                config = parse([preset, *given])[1]
                stored = json.loads(json.dumps(dataclasses.asdict(config)))
                assert config_of(stored) == config, preset
                assert (
                    stored["model"].pop("score_dtype") == "auto"
                    and config_of(stored).model.score_dtype == "float32"
                ), "an older record"
                assert parse(argv_of(preset, config))[1] == config, argv_of(preset, config)
    config = parse(["smoke", *flags])[1]
    assert (
        config != Config()
        and len(argv_of("smoke", config)) > 20
        and argv_of("smoke", PRESETS["smoke"]) == ["smoke"]
    )
    stored = dataclasses.asdict(config)
    stored["grpo"]["zap"] = stored["grpo"].pop("beta")
    try:
        config_of(stored)
        raise AssertionError("an unknown field was accepted")
    except UserError as error:
        assert "grpo.beta" in str(error)
    print(
        "ok  a record's config gives the same config and command again; a field of another version is refused"
    )


def self_check() -> None:
    check_commands()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        with contextlib.redirect_stdout(io.StringIO()):
            train.main(*parse([*TINY, "--intervention", "none2r", "--out-dir", str(run)]))
        check_mutations(run)
        shutil.rmtree(run)


def main(runs: list[str]) -> int:
    torch.set_num_threads(1)
    if not runs:
        self_check()
        return 0
    return int(not all([verify(Path(run)) for run in runs]))


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
