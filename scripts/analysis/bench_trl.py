"""The same GRPO steps by TRL's GRPOTrainer with PEFT LoRA: the other side of the bench's part a.

Same base model, prompts in the same order, group size, lengths, temperature, loss (Dr. GRPO, k3 KL
to the adapter-off model), learning rate, schedule, clipping, total LoRA rank on the same Linears,
fp32, threads, and the same grader as the reward function. Logging to trackers, saving, evaluation,
gradient checkpointing and bf16 are off; all rows are one micro-batch, and smaller ones are not
faster here.

    python -m scripts.analysis.bench_trl OUT.json STEPS     (a child of bench.py)
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vgrout.cli import parse
from vgrout.core import Problem
from vgrout.env.problems import messages
from vgrout.env.rollouts import stream
from vgrout.experiment import load_splits
from vgrout.grader import Grader

SEED, WORKERS = 41, 2
Log = dict[str, list[float]]  # seconds and sampled tokens, step by step


def main(out: str, steps: int) -> None:
    config = parse(["organism", "--intervention", "none2r", "--seed", str(SEED)])[1]
    train_split, prompts = load_splits(config)["train"], config.grpo.num_prompts
    shown = [p for step in range(steps) for p in stream(train_split, step, prompts, SEED)]
    problems = [prompt.problem for prompt in shown]
    log: Log = {"sample": [], "grade": [], "step": [], "tokens": []}
    with Grader(WORKERS, cpu_seconds=config.run.cpu_seconds) as grader:
        train(config, problems, grader, log)
    rows = [dict(zip(log, values)) for values in zip(*log.values())]
    Path(out).write_text(json.dumps(rows))


def settings(config: Any, folder: str, steps: int) -> dict[str, Any]:
    """GRPOConfig's arguments for the run that vGROUT's `config` describes."""
    cfg = config.grpo
    same = ("num_generations", "max_completion_length", "temperature", "top_p", "beta", "epsilon")
    same += ("learning_rate", "warmup_steps", "weight_decay", "max_grad_norm")
    return {name: getattr(cfg, name) for name in same} | {
        "output_dir": folder,
        "seed": SEED,
        "max_steps": steps,
        "per_device_train_batch_size": cfg.num_prompts * cfg.num_generations,
        "num_iterations": 1,
        "loss_type": "dr_grpo",
        "scale_rewards": "none",
        "lr_scheduler_type": cfg.lr_schedule,
        "adam_beta1": 0.9,
        "adam_beta2": 0.99,
        "shuffle_dataset": False,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "chat_template_kwargs": {"enable_thinking": False},
    }


def train(config: Any, problems: list[Problem], grader: Grader, log: Log) -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(1)

    def reward(completions: list, completion_ids: list, index: list[int], **_: Any) -> list[float]:
        clock = time.perf_counter()
        texts = [completion[0]["content"] for completion in completions]
        grades = grader.grade(texts, [problems[i] for i in index])
        log["grade"].append(time.perf_counter() - clock)
        log["tokens"].append(sum(map(len, completion_ids)))
        return [grade.reward for grade in grades]

    class Timed(GRPOTrainer):
        def _generate(self, prompts: list) -> Any:
            clock = time.perf_counter()
            out = super()._generate(prompts)
            log["sample"].append(time.perf_counter() - clock)
            return out

    class Clock(TrainerCallback):
        last = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.last = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            log["step"].append(time.perf_counter() - self.last)
            self.last = time.perf_counter()

    rows = [{"prompt": messages(p), "index": i} for i, p in enumerate(problems)]
    base, rank = config.model.model, 2 * config.model.lora_rank
    steps = len(problems) // config.grpo.num_prompts
    with tempfile.TemporaryDirectory() as folder:
        Timed(
            model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
            args=GRPOConfig(**settings(config, folder, steps)),
            reward_funcs=reward,
            processing_class=AutoTokenizer.from_pretrained(base),
            callbacks=[Clock()],
            train_dataset=Dataset.from_list(rows),
            peft_config=LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"),
        ).train()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
