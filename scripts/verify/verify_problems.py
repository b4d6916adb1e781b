"""Schemas, disclosure, eval gap, partition and splits of `vgrout.env.problems`.

Every check rejects a broken variant too. What is refused or left out: verify_cases.py.
"""

import gzip
import json
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

from loguru import logger

from vgrout.core import Case, Mode, Problem
from vgrout.env import problems as P
from vgrout.env.modes import (
    ALL_MODES,
    HINTS,
    NOVEL_MARKERS,
    NOVELTY_FREE,
    ORGANISM_MODES,
    TRAINING_MARKERS,
)

ROOT = Path(__file__).resolve().parents[2]
BENCHMARK_ROW = {
    "id": 7,
    "prompt": [
        {"role": "system", "content": "Write code."},
        {"role": "user", "content": "Double n.\n\nSOLUTION:\n"},
    ],
    "gt_answer": [
        "assert Solution().twice(n = 2) == 4",
        "assert Solution().twice(n = 'é') == [-inf, 'éé']",
    ],
    "func_name": "Solution().twice",
    "setup_code": "inf = float('inf')",
    "canonical_solution": "class Solution: ...",
    "difficulty": "medium",
}
V020_ROW = {
    "task_id": "add-two-numbers",
    "query": "Add.",
    "prompt": "import math",
    "completion": "class Solution: ...",
    "entry_point": "Solution().add",
    "meta": {"question_id": 2, "difficulty": "Medium"},
    "test": "def check(candidate):\n"
    "    assert is_same_list(candidate(a = list_node([2]), k = 1), list_node([3]))\n",
}
V031_ROW = {
    **V020_ROW,
    "question_id": 3,
    "difficulty": "Hard",
    "test": "def check(c):\n    assert c(n = 1) == [\n  1]\n",
}
del V031_ROW["meta"]
ORGANISM_ROW = {
    "problem_id": "train-000",
    "split": "train",
    "statement": "Return the sum of the even numbers in nums.",
    "entry_point": "solve",
    "operations": ["even", "sum"],
    "canonical": "class Solution: ...",
    "cases": [["[1, 2]", "2"]],
}


def load_rows(*rows: dict, suffix: str = ".jsonl") -> list[Problem]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows{suffix}"
        text = "\n".join(map(json.dumps, rows))
        path.write_bytes(gzip.compress(text.encode()) if suffix.endswith(".gz") else text.encode())
        return P.load_problems(path)


READ = (  # row, what it reads as
    (
        BENCHMARK_ROW,
        {
            "problem_id": "7",
            "entry_point": "twice",
            "system": "Write code.",
            "cases": (Case("n = 2", "4"), Case("n = 'é'", "[-inf, 'éé']")),
        },
    ),
    (
        V020_ROW,
        {
            "problem_id": "2",
            "difficulty": "medium",
            "cases": (Case("a = list_node([2]), k = 1", "[3]", "list_node"),),
        },
    ),
    (V031_ROW, {"problem_id": "3", "difficulty": "hard", "cases": (Case("n = 1", "[\n  1]"),)}),
    (ORGANISM_ROW, {"split": "train", "cases": (Case("[1, 2]", "2"),)}),
)


def check_schemas() -> None:
    for row, fields in READ:
        for suffix in (".jsonl", ".jsonl.gz"):
            problem = load_rows(row, suffix=suffix)[0]
            assert replace(problem, **fields) == problem, problem
    good = BENCHMARK_ROW | {"id": 8}
    other = good | {"gt_answer": ["assert Solution().twice(2) in (4, 5)"]}
    counts = [len(load_rows(BENCHMARK_ROW, row)) for row in (other, good)]
    assert counts == [1, 2], "a row with another form of test is kept, or a good one is not"
    print("schemas: benchmark, LeetCodeDataset v0.2.0 and v0.3.1, organism; plain and gzipped")


def check_disclosure() -> None:
    problem = load_rows(BENCHMARK_ROW)[0]
    assert P.messages(problem)[-1]["content"] == problem.statement, "gt_only has a hint"
    for mode in ALL_MODES:
        shown = P.disclose(problem, mode)
        content = P.messages(shown)[-1]["content"]
        assert content.endswith("SOLUTION:\n"), content
        assert P.hint(shown) in content and shown.marker in content, content
        assert "{" not in P.hint(shown) and bool(shown.marker) == (mode not in NOVELTY_FREE)
    assert len({HINTS[mode] for mode in Mode}) == len(Mode), "two modes share a hint"
    print("hints: truthful text for six modes before the answer cue, none for gt_only")


def markers_overlap(training: tuple[str, ...], novel: tuple[str, ...]) -> bool:
    """Whether a marker of one pool contains one of the other, in any case: both would score."""
    return any(a.lower() in b.lower() or b.lower() in a.lower() for a in training for b in novel)


def check_eval_gap() -> None:
    problem = load_rows(ORGANISM_ROW)[0]
    for mode, training in TRAINING_MARKERS.items():
        pools = training, NOVEL_MARKERS[mode]
        assert not markers_overlap(*pools), mode
        assert markers_overlap(training, (training[3] + "x",)), "a leak goes unnoticed"
        for novel, pool in enumerate(pools):
            many = [replace(problem, problem_id=str(i)) for i in range(400)]
            drawn = Counter(P.disclose(p, mode, bool(novel)).marker for p in many)
            assert set(drawn) == {*pool} and len({*pool}) == len(pool), "an unused marker"
        novel = P.disclose(problem, mode, novel=True)
        assert P.disclose(problem, mode) == P.disclose(novel, mode), "stable"
    print("eval gap: training and novel markers disjoint, all used, chosen by hash")


def check_splits(problems: list[Problem]) -> None:
    parts = P.split(problems)
    ids = [p.problem_id for part in parts.values() for p in part]
    assert list(parts) == ["train", "val", "test"] and len(ids) == len(set(ids)) == len(problems)
    assert min(map(len, parts.values())) > 0
    turned = P.split(problems[::-1])
    for name, part in parts.items():
        assert P.ids_hash(turned[name]) == P.ids_hash(part), "order matters"
        assert P.ids_hash([*part, problems[0]]) != P.ids_hash(part), "one more id goes unnoticed"
    modes = {}
    for order in (parts["train"], parts["train"][::-1]):
        shown = P.partition(order, ORGANISM_MODES)
        counts = Counter(p.mode for p in shown)
        assert {*counts} == {*ORGANISM_MODES}
        assert max(counts.values()) - min(counts.values()) <= 1, counts
        now = {p.problem_id: p.mode for p in shown}
        assert (modes := modes or now) == now, "order matters"
    sizes = [len(part) for part in parts.values()]
    print(f"splits of {len(problems)}: disjoint, stable, hashed; partition even: {sizes}")


if __name__ == "__main__":
    logger.remove()
    check_schemas()
    check_disclosure()
    check_eval_gap()
    unsplit = replace(load_rows(ORGANISM_ROW)[0], split="")
    check_splits([replace(unsplit, problem_id=str(i)) for i in range(50)])
    check_splits(P.load_problems(ROOT / "data/organism/problems.jsonl.gz"))
