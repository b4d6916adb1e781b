"""Read a run's rollouts, or what its evaluations sampled, in the terminal: choose by step, mode, zone, outcome and score.

Run: python scripts/view/show.py RUN_DIR [--step 3] [--mode sentinel] [--zone ROUTE] [--outcome hack] [--above 0.1] [--limit 5]
     python scripts/view/show.py RUN_DIR --evals deployed --outcome hack        (what the deployed policy wrote)
"""

import argparse
import sys
from collections import Counter

from tabulate import tabulate

from vgrout.core import Mode, UserError, Zone
from vgrout.entry import at_least, run_main
from vgrout.run.records import load_evals, load_record, load_rollouts

OUTCOMES = ("hack", "solve", "neither")


def outcome(row: dict) -> str:
    return "hack" if row["reward_hack"] else "solve" if row["correct"] else "neither"


def chosen(rows: list[dict], options: argparse.Namespace) -> list[dict]:
    """Return the rows that pass every filter that was given; a row without a score passes no score filter."""
    wanted = {"step": options.step, "mode": options.mode, "zone": options.zone}
    rows = [
        r
        for r in rows
        if all(value is None or r.get(key) == value for key, value in wanted.items())
    ]
    rows = [
        r
        for r in rows
        if options.outcome in (None, outcome(r))
        and (options.students is False or not r.get("teacher"))
    ]
    if options.above is not None:
        rows = [r for r in rows if r.get("score") is not None and r["score"] >= options.above]
    if options.below is not None:
        rows = [r for r in rows if r.get("score") is not None and r["score"] < options.below]
    return rows


def none(row: dict) -> str:
    """Why a row has no zone."""
    return "evaluated" if "state" in row else "skipped"


def summary(rows: list[dict]) -> str:
    """Return a table of counts: outcome by zone (skipped: the row's group had no variance in reward)."""
    zones = [*(zone.name for zone in Zone), "skipped"]
    counts = Counter((outcome(row), row.get("zone") or none(row)) for row in rows)
    zones = [
        zone
        for zone in (*zones, "evaluated")
        if zone != "evaluated" or any("state" in row for row in rows)
    ]
    body = [
        [name, *(counts[name, zone] for zone in zones), sum(counts[name, z] for z in zones)]
        for name in OUTCOMES
    ]
    return tabulate(body, headers=["outcome", *zones, "all"])


def text(row: dict) -> str:
    number = lambda key: "–" if row.get(key) is None else f"{row[key]:+.3f}"  # noqa: E731
    head = (
        f"── step {row['step']}  {row['problem_id']}  mode {row['mode']} {row['marker']!r}  zone {row.get('zone') or none(row)}  "
        f"score {number('score')}  A {number('advantage')}  reward {row['reward']:.1f}  {outcome(row)}  {row['verdict']}"
        + ("  TEACHER" if row.get("teacher") else "") + ("  sampled ablated" if row.get("sampled_ablated") else "")
        + (f"  evaluated {row['state']}, {row['split']}, {row['markers']}" if "state" in row else "")
    )  # fmt: skip
    return f"{head}\n{printable(row['completion'].rstrip())}\n"


def printable(text: str) -> str:
    """Return the text with what a terminal would obey, escape sequences above all, written as escapes."""
    return "".join(c if c in "\n\t" or c.isprintable() else ascii(c)[1:-1] for c in text)


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
    parser.add_argument(
        "--evals",
        choices=["deployed", "as_trained", "ablated"],
        help="completions of evaluations in this state instead",
    )
    parser.add_argument(
        "--limit",
        type=at_least(0),
        default=5,
        help="rollouts printed, evenly spread over those chosen (default 5)",
    )
    options = parser.parse_args()
    record = load_record(options.run)
    rows = (
        load_rollouts(options.run)
        if options.evals is None
        else [r for r in load_evals(options.run) if r["state"] == options.evals]
    )
    if not rows:
        kind = (
            "rollouts (rollouts.jsonl.gz)"
            if options.evals is None
            else f"evaluations (evals.jsonl.gz) in the state {options.evals}"
        )
        raise UserError(f"{options.run} holds no {kind}")
    rows = chosen(rows, options)
    step = max(1, -(-len(rows) // max(options.limit, 1)))
    shown = rows[::step] if options.limit else []
    print(*map(text, shown), sep="\n")
    print(summary(rows))
    print(
        f"{record.arm} seed {record.seed} ({record.status}): {len(rows)} rollouts chosen, {len(shown)} shown"
    )


if __name__ == "__main__":
    try:
        run_main(main)
    except BrokenPipeError:  # the reader (head, less) has seen enough
        sys.stderr.close()
