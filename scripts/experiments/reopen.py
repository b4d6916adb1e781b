"""A stored run, opened again on the very data that made it: record, config, problems, policy."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from vgrout import train
from vgrout.cli import load_splits
from vgrout.config import ARMS, Arm, Config
from vgrout.core import EvalResult, Problem, RunRecord, UserError
from vgrout.env.rollouts import Sampling
from vgrout.grader import Grader
from vgrout.model.policy import Policy
from vgrout.run.evaluate import evaluate
from vgrout.run.records import load_adapter, load_record, sha256_file
from vgrout.run.repeat import config_of


@dataclass
class Stored:
    path: Path
    record: RunRecord
    config: Config
    arm: Arm
    splits: dict[str, list[Problem]]
    policy: Policy  # at its initialisation until `load`
    base: dict[str, Tensor]  # the adapter at its initialisation

    @property
    def sampling(self) -> Sampling:
        cfg = self.config.grpo
        return Sampling(
            cfg.max_completion_length,
            cfg.temperature,
            cfg.top_p,
            self.config.model.sample_token_budget,
        )

    def load(self, tensors: dict[str, Tensor] | None = None) -> None:
        """Put an adapter in place; by default the run's final one."""
        self.policy.adapter.load_state_dict(
            load_adapter(self.path)[0] if tensors is None else tensors
        )

    def cell(self, grader: Grader, name: str, ablated: bool, draws: int) -> EvalResult:
        """The present policy on the test split, novel markers; `name` tells evaluations apart."""
        cfg = self.config
        generator = train.seeded(self.policy, "after", cfg.run.seed, name, ablated)
        return evaluate(
            self.policy,
            self.splits["test"],
            grader,
            self.sampling,
            split="test",
            markers="novel",
            state=name,
            ablated=ablated,
            step=self.record.steps_done,
            draws=draws,
            generator=generator,
        )


def reopen(run: str | Path, finished: bool = True) -> Stored:
    """UserError where the run is not `finished`, or was made with other data files."""
    record = load_record(run)
    if finished and record.status != "finished":
        raise UserError(
            f"{run} has no final evaluation ({record.status}): finish it with --resume first"
        )
    config = config_of(record.config)
    for path, digest in record.data_hashes.items():
        if not Path(path).is_file() or sha256_file(path) != digest:
            raise UserError(
                f"{path} is not the file that {run} was made with: check out {record.commit[:12]}"
            )
    splits = load_splits(config)
    policy = train.build_policy(config, splits)
    base = {k: v.clone() for k, v in policy.adapter.state_dict().items()}
    return Stored(Path(run), record, config, ARMS[record.arm], splits, policy, base)
