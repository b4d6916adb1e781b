"""Read a run's rollouts in the terminal: choose by step, mode, zone, outcome and score.

Run: python scripts/show.py RUN_DIR [--step 3] [--mode sentinel] [--zone ROUTE] [--outcome hack] [--above 0.1] [--limit 5]
"""

import argparse
import sys
from collections import Counter

from tabulate import tabulate

from vgrout.entry import run_main
from vgrout.records import load_record, load_rollouts
from vgrout.types import Mode, Zone

OUTCOMES = ("hack", "solve", "neither")


def outcome(row: dict) -> str:
    return "hack" if row["reward_hack"] else "solve" if row["correct"] else "neither"


def chosen(rows: list[dict], options: argparse.Namespace) -> list[dict]:
    """Return the rows that pass every filter that was given; a row without a score passes no score filter."""
    wanted = {"step": options.step, "mode": options.mode, "zone": options.zone}
    rows = [r for r in rows if all(value is None or r.get(key) == value for key, value in wanted.items())]
    rows = [r for r in rows if options.outcome in (None, outcome(r)) and (options.students is False or not r["teacher"])]
    if options.above is not None:
        rows = [r for r in rows if r.get("score") is not None and r["score"] >= options.above]
    if options.below is not None:
        rows = [r for r in rows if r.get("score") is not None and r["score"] < options.below]
    return rows


def summary(rows: list[dict]) -> str:
    """Return a table of counts: outcome by zone (skipped: the row's group had no variance in reward)."""
    zones = [*(zone.name for zone in Zone), "skipped"]
    counts = Counter((outcome(row), row.get("zone") or "skipped") for row in rows)
    body = [[name, *(counts[name, zone] for zone in zones), sum(counts[name, z] for z in zones)] for name in OUTCOMES]
    return tabulate(body, headers=["outcome", *zones, "all"])


def text(row: dict) -> str:
    number = lambda key: "–" if row.get(key) is None else f"{row[key]:+.3f}"  # noqa: E731
    head = (
        f"── step {row['step']}  {row['problem_id']}  mode {row['mode']} {row['marker']!r}  zone {row.get('zone') or 'skipped'}  "
        f"score {number('score')}  A {number('advantage')}  reward {row['reward']:.1f}  {outcome(row)}  {row['verdict']}"
        + ("  TEACHER" if row["teacher"] else "") + ("  sampled ablated" if row["sampled_ablated"] else "")
    )  # fmt: skip
    return f"{head}\n{row['completion'].rstrip()}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="run directory")
    parser.add_argument("--step", type=int, help="optimiser step")
    parser.add_argument("--mode", choices=[str(mode) for mode in Mode])
    parser.add_argument("--zone", choices=[zone.name for zone in Zone])
    parser.add_argument("--outcome", choices=OUTCOMES)
    parser.add_argument("--above", type=float, help="score at least")
    parser.add_argument("--below", type=float, help="score less than")
    parser.add_argument("--students", action="store_true", help="leave teacher rows out")
    parser.add_argument("--limit", type=int, default=5, help="rollouts printed, evenly spread over those chosen (default 5)")
    options = parser.parse_args()
    record = load_record(options.run)
    rows = chosen(load_rollouts(options.run), options)
    step = max(1, -(-len(rows) // max(options.limit, 1)))
    print(*map(text, rows[::step] if options.limit else []), sep="\n")
    print(summary(rows))
    print(f"{record.arm} seed {record.seed} ({record.status}): {len(rows)} rollouts chosen, {len(rows[::step])} shown")


if __name__ == "__main__":
    try:
        run_main(main)
    except BrokenPipeError:  # the reader (head, less) has seen enough
        sys.stderr.close()
