"""Fetch the real problem sets into data/leetcode/ (which git ignores), each at a pinned commit.

LeetCodeDataset and the benchmark of Ariahw, Engels & Nanda with its own splits, both from GitHub. A
file that is there already is left alone. Nothing is executed or unpickled: all are JSON lines.

Run: python -m scripts.tools.download_data
"""

import hashlib
import sys
import urllib.request
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "data" / "leetcode"
HOST = "https://raw.githubusercontent.com"
DATASET = "newfacade/LeetCodeDataset/182cd19fd53161efd70a1ef074fe1056b659bfa3/data"
BENCHMARK = "ariahw/rl-rewardhacking/bf5cdb8d1a047032a9e23e00272aab938b12354b/results/data"
FILES = {  # name → where it is, and git's id of its content there
    "LeetCodeDataset-v0.2.0-train.jsonl.gz": (DATASET, "f16621ebb4663b87fe464bc181057a4d4e2bbf02"),
    "LeetCodeDataset-v0.3.1-test.jsonl.gz": (DATASET, "056d9808e94146f17800c2656f85ec8495fbd9f5"),
    "leetcode_train_medhard_filtered.jsonl": (
        BENCHMARK,
        "c10a5f39a18489200f4487e849ab86f166c31c7e",
    ),
    "leetcode_test_medhard.jsonl": (BENCHMARK, "05a1d425a840bbdcdba13a9074176c609df0d8f1"),
}


def blob_id(content: bytes) -> str:
    """Git's id of a file: SHA-1 over its size and content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def fetch(name: str) -> str:
    """Put the pinned file in place; returns what was done. OSError where it cannot be had."""
    folder, pinned = FILES[name]
    path = FOLDER / name
    if path.exists():
        same = blob_id(path.read_bytes()) == pinned
        return "there already" if same else "kept as it is, NOT the pinned version"
    with urllib.request.urlopen(f"{HOST}/{folder}/{name}", timeout=60) as answer:
        content = answer.read()
    if blob_id(content) != pinned:
        raise OSError("what came is not the pinned version")
    part = FOLDER / f"{name}.tmp"
    part.write_bytes(content)
    part.rename(path)
    return f"fetched, {len(content) / 1e6:.1f} MB"


def main() -> int:
    FOLDER.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name in FILES:
        try:
            print(f"{name}: {fetch(name)}")
        except OSError as error:  # the network's errors are OSErrors
            why, remedy = str(error).splitlines()[0], "check the network, or copy it to"
            print(f"error: could not fetch {name} ({why}): {remedy} data/leetcode/")
            failed += 1
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
