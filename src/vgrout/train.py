"""GRPO with vector gradient routing: sample, grade, score, route, step.

    python -m vgrout.train organism --intervention routeV --seed 41 --out-dir out/runs/mine

The loop is docs/loop.md in Python. It differs from textbook GRPO in five ways: no standard
deviation in the advantage and no completion length in the loss (Dr. GRPO), groups without variance
are skipped, every row's update is masked by its zone, the two LoRA blocks clip and step apart, and
the old log-probs are those of the policy state that sampled the row. No label of a training rollout
reaches the update: `compose` reads the reward of a grade and nothing else.
"""

import sys

from vgrout.cli import Config, parse_or_exit, run_main

if __name__ == "__main__":
    PRESET, CONFIG = parse_or_exit(sys.argv[1:])  # bad input is answered before torch loads

from vgrout.env.rollouts import compose, grade_groups, sample_groups
from vgrout.experiment import Experiment
from vgrout.model.update import update
from vgrout.run.audit import audit


def main(preset: str, config: Config) -> None:
    with Experiment(preset, config) as run:
        policy, optimizer, config = run.policy, run.optimizer, run.config
        for step in run.steps():  # the base is evaluated first; a checkpoint is continued
            live = run.phases.at(step)
            figures = {"lr": run.schedule.get_last_lr()[0]}
            with run.timed("sec_refresh"):
                figures |= run.phases.refresh(policy, step)
            with run.timed("sec_sample"):
                groups = sample_groups(
                    policy,
                    run.prompts(step, live.phase),
                    run.sampling,
                    num_generations=config.grpo.num_generations,
                    deployed_share=live.phase.gen_deploy_frac,
                    step=step,
                    generator=run.generator("sample", step),
                )
            with run.timed("sec_grade"):
                grade_groups(groups, run.grader, live.phase.loophole_pays)
            composed = compose(groups, policy, live.keeps_equal_groups)  # None: no variance
            if live.begins(step):
                live.enter(policy, optimizer, groups)  # nothing, or another quarantine
            gated = trained = None
            if composed is not None:
                with run.timed("sec_score"):  # pass 1: scores → zones
                    gated = live.gate(policy, composed.batch)
                    gated = live.control(policy, composed, gated)  # of controls and the oracle
                trained = live.action(composed.batch, gated)  # route, filter, penalise, deduct
            figures |= run.label_norms(step, composed, trained)  # for the log alone
            if trained is not None:
                with run.timed("sec_update"):  # pass 2: masked forward, backward, step
                    figures |= update(
                        policy, optimizer, trained, composed.behaviour, config.grpo, config.phase
                    )
            run.schedule.step()
            figures |= audit(groups, composed, gated, policy.eos_ids)  # labels, for the log alone
            run.log(step, figures, groups, composed, gated)
            run.evaluate_and_save(step)
        run.evaluate_final()


if __name__ == "__main__":
    run_main(main, PRESET, CONFIG)
