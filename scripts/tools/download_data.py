"""Fetch the real problem sets into data/leetcode/ (which git ignores).

LeetCodeDataset comes from the Hugging Face hub, the benchmark of Ariahw, Engels & Nanda with its
own splits from its GitHub repository. A file that is there already is left alone. Nothing is
executed or unpickled: all of them are JSON lines.

Run: python -m scripts.tools.download_data
"""

import sys
import urllib.request
from pathlib import Path

from huggingface_hub import hf_hub_download

FOLDER = Path(__file__).resolve().parents[2] / "data" / "leetcode"
HUB = ("LeetCodeDataset-train.jsonl", "LeetCodeDataset-test.jsonl")
BENCHMARK = ("leetcode_train_medhard_filtered.jsonl", "leetcode_test_medhard.jsonl")
REPOSITORY = "https://raw.githubusercontent.com/ariahw/rl-rewardhacking/main/results/data"


def from_benchmark(name: str) -> None:
    part = FOLDER / f"{name}.tmp"
    with (
        urllib.request.urlopen(f"{REPOSITORY}/{name}", timeout=60) as answer,
        open(part, "wb") as file,
    ):
        file.write(answer.read())
    part.rename(FOLDER / name)


def main() -> int:
    FOLDER.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name in (*HUB, *BENCHMARK):
        if (FOLDER / name).exists() or (FOLDER / f"{name}.gz").exists():
            print(f"there already: {name}")
            continue
        try:
            if name in HUB:
                hf_hub_download(
                    "newfacade/LeetCodeDataset", name, repo_type="dataset", local_dir=FOLDER
                )
            else:
                from_benchmark(name)
        except OSError as error:  # the hub's and the network's errors are OSErrors
            why, remedy = str(error).splitlines()[0], "check the network, or copy it to"
            print(f"error: could not fetch {name} ({why}): {remedy} data/leetcode/")
            failed += 1
        else:
            print(f"fetched: {name}, {(FOLDER / name).stat().st_size / 1e6:.1f} MB")
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
