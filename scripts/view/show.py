"""Read a run's rollouts, or what its evaluations sampled, in the terminal, filtered.

Filters: step, mode, zone, outcome and score. Control characters of a completion are printed as
visible escapes: a completion may hold codes that recolour, move or clear the terminal.

Run: python -m scripts.view.show RUN_DIR [--step 3] [--mode sentinel] [--zone ROUTE]
         [--outcome hack] [--above 0.1] [--limit 5]
     python -m scripts.view.show RUN_DIR --evals deployed --outcome hack
"""

import argparse
import sys
from collections import Counter

from scripts.view.output import parser, table, text, visible

from vgrout.core import Mode, UserError, Zone, at_least, run_main
from vgrout.run.records import load_evals, load_record, load_rollouts

OUTCOMES = ("hack", "solve", "neither")
ZONES = tuple(zone.name for zone in Zone)


def outcome(row: dict) -> str:
    return "hack" if row["reward_hack"] else "solve" if row["correct"] else "neither"


def zone_of(row: dict) -> str:
    """The row's zone; without one it was evaluated, or its group had no variance in reward."""
    return row.get("zone") or ("evaluated" if "state" in row else "skipped")


def chosen(row: dict, options: argparse.Namespace) -> bool:
    """Whether a row passes every filter given; without a score it passes no score filter."""
    own = row | {"outcome": outcome(row)}
    for key in ("step", "mode", "zone", "outcome"):
        if getattr(options, key) not in (None, own.get(key)):
            return False
    if options.above is not None:
        score = row.get("score")
        if score is None or score < options.above:
            return False
    return not (options.students and row.get("teacher"))


def summary(rows: list[dict]) -> str:
    """A table of counts, outcome by zone."""
    counts = Counter((outcome(row), zone_of(row)) for row in rows)
    zones = [*ZONES, *sorted({zone_of(row) for row in rows} - {*ZONES})]
    body = [[name, *(counts[name, zone] for zone in zones)] for name in OUTCOMES]
    body = [[*line, sum(line[1:])] for line in body]
    return table(body, ["outcome", *zones, "all"])


def described(row: dict) -> str:
    """A row's head line and its completion."""
    parts = [
        f"── step {row['step']}",
        row["problem_id"],
        f"mode {row['mode']} {row['marker']!r}",
        f"zone {zone_of(row)}",
        f"score {text(row.get('score'))}",
        f"A {text(row.get('advantage'))}",
        f"reward {row['reward']:.1f}",
        outcome(row),
        row["verdict"],
        "TEACHER" if row.get("teacher") else "",
        "sampled ablated" if row.get("sampled_ablated") else "",
    ]
    if "state" in row:
        parts.append(f"evaluated {row['state']}, {row['split']}, {row['markers']}")
    head = "  ".join(filter(None, parts))
    return visible(f"{head}\n{row['completion'].rstrip()}\n")


def spread(rows: list[dict], limit: int) -> list[dict]:
    """At most `limit` rows, evenly spread."""
    step = max(1, -(-len(rows) // max(limit, 1)))
    return rows[::step] if limit else []


def arguments() -> argparse.Namespace:
    command = parser(__doc__)
    command.add_argument("run", help="run directory")
    command.add_argument("--step", type=int, help="optimiser step")
    command.add_argument("--mode", choices=[str(mode) for mode in Mode])
    command.add_argument("--zone", choices=ZONES)
    command.add_argument("--outcome", choices=OUTCOMES)
    command.add_argument("--above", type=float, help="score at least")
    command.add_argument("--students", action="store_true", help="leave teacher rows out")
    states = ("deployed", "as_trained", "ablated")
    command.add_argument("--evals", choices=states, help="completions of evaluations instead")
    printed = "rollouts printed, evenly spread over those chosen (default 5)"
    command.add_argument("--limit", type=at_least(0), default=5, help=printed)
    return command.parse_args()


def main() -> None:
    options = arguments()
    record = load_record(options.run)
    if options.evals is None:
        rows, kind = load_rollouts(options.run), "rollouts (rollouts.jsonl.gz)"
    else:
        rows = [row for row in load_evals(options.run) if row["state"] == options.evals]
        kind = f"evaluations (evals.jsonl.gz) in the state {options.evals}"
    if not rows:
        raise UserError(f"{options.run} holds no {kind}")
    rows = [row for row in rows if chosen(row, options)]
    printed = spread(rows, options.limit)
    for row in printed:
        print(described(row))
    print(summary(rows))
    name = f"{record.arm} seed {record.seed} ({record.status})"
    print(f"{name}: {len(rows)} rollouts chosen, {len(printed)} shown")


if __name__ == "__main__":
    try:
        run_main(main)
    except BrokenPipeError:  # the reader (head, less) has seen enough
        sys.stderr.close()
