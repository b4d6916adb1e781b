"""A stored run, opened again on the very data that made it: record, config, problems, policy."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from vgrout.arms import deployed_state
from vgrout.config import Config
from vgrout.core import EvalResult, Problem, RunRecord, UserError
from vgrout.experiment import build_policy, load_splits, sampling_of
from vgrout.files import sha256_file
from vgrout.grader import Grader
from vgrout.model.policy import Policy
from vgrout.run.evaluate import evaluate, seeded
from vgrout.run.records import load_adapter, load_record
from vgrout.run.repeat import config_of


@dataclass
class Stored:
    path: Path
    record: RunRecord
    config: Config
    splits: dict[str, list[Problem]]
    policy: Policy  # at its initialisation until `load`
    base: dict[str, Tensor]  # the adapter at its initialisation

    @property
    def ablates(self) -> bool:
        """The arm deploys without the quarantine."""
        return deployed_state(self.config) == "ablated"

    def load(self, tensors: dict[str, Tensor] | None = None) -> None:
        """Put an adapter in place; by default the run's final one."""
        own = load_adapter(self.path)[0] if tensors is None else tensors
        self.policy.adapter.load_state_dict(own)

    def cell(self, grader: Grader, name: str, ablated: bool, draws: int) -> EvalResult:
        """The present policy on the test split, novel markers; `name` tells evaluations apart."""
        return evaluate(
            self.policy,
            self.splits["test"],
            grader,
            sampling_of(self.config),
            split="test",
            markers="novel",
            state=name,
            ablated=ablated,
            step=self.record.steps_done,
            draws=draws,
            generator=seeded(self.policy, "after", self.config.run.seed, name, ablated),
        )


def finished(run: str | Path) -> RunRecord:
    """The record of a finished run; UserError where it is not."""
    record = load_record(run)
    if record.status != "finished":
        remedy = "finish it with --resume first"
        raise UserError(f"{run} has no final evaluation ({record.status}): {remedy}")
    return record


def reopen(run: str | Path, ended: bool = True) -> Stored:
    """UserError where the run is to have `ended` and has not, or was made with other data files."""
    record = finished(run) if ended else load_record(run)
    for path, digest in record.data_hashes.items():
        if not Path(path).is_file() or sha256_file(path) != digest:
            remedy = f"check out {record.commit[:12]}"
            raise UserError(f"{path} is not the file that {run} was made with: {remedy}")
    config = config_of(record.preset, record.config)
    splits = load_splits(config)
    policy = build_policy(config, splits)
    base = {name: x.clone() for name, x in policy.adapter.state_dict().items()}
    return Stored(Path(run), record, config, splits, policy, base)
