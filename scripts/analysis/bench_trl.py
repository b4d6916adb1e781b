"""The same GRPO steps by TRL's GRPOTrainer with PEFT LoRA: the other side of `scripts/analysis/bench.py --only a`, in a process of its own.

Same base model, prompts in the same order, group size, lengths, temperature, loss (Dr. GRPO, k3 KL to the adapter-off model), learning
rate, schedule, clipping, total LoRA rank on the same Linears, fp32, threads, and the same grader as the reward function. Logging to
trackers, saving, evaluation, gradient checkpointing and bf16 are off; all rows are one micro-batch, and smaller ones are not faster here.

    python scripts/analysis/bench_trl.py OUT.json --steps 9 [--threads 1] [--micro-batch 48]     (a child of scripts/analysis/bench.py)
"""

import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from scripts.analysis.bench_turns import wait_for_turn

from vgrout.cli import load_splits, parse
from vgrout.env.problems import messages
from vgrout.env.rollouts import stream
from vgrout.grader import Grader


@dataclass(frozen=True)
class Args:
    """Train with TRL, a step at a turn, and write what every step took."""

    out: Annotated[Path, tyro.conf.Positional]
    steps: int = 9
    threads: int = 1
    seed: int = 41
    workers: int = 2  # sandbox processes
    micro_batch: int = 48  # rows


def main(args: Args) -> None:
    _, config = parse(["organism", "--intervention", "none2r", "--seed", str(args.seed)])
    with Grader(args.workers, cpu_seconds=config.run.cpu_seconds) as grader:
        log: dict[str, list[float]] = {
            "sec_sample": [],
            "sec_grade": [],
            "sec_step": [],
            "tokens": [],
        }
        try:
            train(args, config, grader, log)
        finally:
            args.out.write_text(json.dumps(log))


def train(args: Args, config: Any, grader: Grader, log: dict[str, list[float]]) -> None:
    """Fills `log` with seconds and sampled tokens, step by step."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(args.threads)
    cfg, rows = config.grpo, config.grpo.num_prompts * config.grpo.num_generations
    train_split = load_splits(config)["train"]
    problems = [
        p
        for step in range(args.steps)
        for p in stream(train_split, step, cfg.num_prompts, args.seed)
    ]

    def reward(
        completions: list, completion_ids: list[list[int]], index: list[int], **_: Any
    ) -> list[float]:
        clock = time.perf_counter()
        grades = grader.grade([c[0]["content"] for c in completions], [problems[i] for i in index])
        log["sec_grade"].append(time.perf_counter() - clock)
        log["tokens"].append(sum(map(len, completion_ids)))
        return [grade.reward for grade in grades]

    class Timed(GRPOTrainer):
        def _generate(self, prompts: list) -> Any:
            clock = time.perf_counter()
            out = super()._generate(prompts)
            log["sec_sample"].append(time.perf_counter() - clock)
            return out

    class Clock(TrainerCallback):
        last = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.last = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            log["sec_step"].append(time.perf_counter() - self.last)
            wait_for_turn()
            self.last = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder, seed=args.seed, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
            save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_num_workers=0, dataloader_pin_memory=False,
            max_steps=args.steps, per_device_train_batch_size=args.micro_batch, gradient_accumulation_steps=rows // args.micro_batch,
            num_generations=cfg.num_generations, num_iterations=1, max_completion_length=cfg.max_completion_length,
            temperature=cfg.temperature, top_p=cfg.top_p, beta=cfg.beta, epsilon=cfg.epsilon, loss_type="dr_grpo", scale_rewards="none",
            learning_rate=cfg.learning_rate, lr_scheduler_type=cfg.lr_schedule, warmup_steps=cfg.warmup_steps,
            weight_decay=cfg.weight_decay, adam_beta1=0.9, adam_beta2=0.99, max_grad_norm=cfg.max_grad_norm, shuffle_dataset=False,
            chat_template_kwargs={"enable_thinking": False},
        )  # fmt: skip
        trainer = Timed(
            model=AutoModelForCausalLM.from_pretrained(config.model.model, dtype=torch.float32), args=settings, reward_funcs=reward,
            processing_class=AutoTokenizer.from_pretrained(config.model.model), callbacks=[Clock()],
            train_dataset=Dataset.from_list([{"prompt": messages(p), "index": i} for i, p in enumerate(problems)]),
            peft_config=LoraConfig(r=2 * config.model.lora_rank, lora_alpha=2 * config.model.lora_rank, target_modules="all-linear"),
        )  # fmt: skip
        trainer.train()


if __name__ == "__main__":
    main(tyro.cli(Args, args=sys.argv[1:]))
