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

from scripts.view.output import parser, table, visible

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
    found = {"outcome": outcome(row)} | {key: row.get(key) for key in ("step", "mode", "zone")}
    if any(getattr(options, key) not in (None, value) for key, value in found.items()):
        return False
    score = row.get("score")
    nan = float("nan") if score is None else score  # no comparison with it holds
    above = options.above is None or nan >= options.above
    below = options.below is None or nan < options.below
    return above and below and not (options.students and row.get("teacher"))


def summary(rows: list[dict]) -> str:
    """A table of counts, outcome by zone."""
    counts = Counter((outcome(row), zone_of(row)) for row in rows)
    zones = [*ZONES, *sorted({zone_of(row) for row in rows} - {*ZONES})]
    body = [[name, *(counts[name, zone] for zone in zones)] for name in OUTCOMES]
    body = [[*line, sum(line[1:])] for line in body]
    return table(body, ["outcome", *zones, "all"])


def described(row: dict) -> str:
    """A row's head line and its completion."""
    signed = {k: "–" if row.get(k) is None else f"{row[k]:+.3f}" for k in ("score", "advantage")}
    where = f"mode {row['mode']} {row['marker']!r}  zone {zone_of(row)}"
    numbers = f"score {signed['score']}  A {signed['advantage']}  reward {row['reward']:.1f}"
    parts = [
        f"── step {row['step']}",
        row["problem_id"],
        where,
        numbers,
        outcome(row),
    ]
    parts += [row["verdict"], "TEACHER" if row.get("teacher") else ""]
    parts += ["sampled ablated" if row.get("sampled_ablated") else ""]
    if "state" in row:
        parts.append(f"evaluated {row['state']}, {row['split']}, {row['markers']}")
    head = "  ".join(filter(None, parts))
    return visible(f"{head}\n{row['completion'].rstrip()}\n")


def arguments() -> argparse.Namespace:
    command = parser(__doc__)
    command.add_argument("run", help="run directory")
    command.add_argument("--step", type=int, help="optimiser step")
    command.add_argument("--mode", choices=[str(mode) for mode in Mode])
    command.add_argument("--zone", choices=ZONES)
    command.add_argument("--outcome", choices=OUTCOMES)
    command.add_argument("--above", type=float, help="score at least")
    command.add_argument("--below", type=float, help="score less than")
    command.add_argument("--students", action="store_true", help="leave teacher rows out")
    states = ["deployed", "as_trained", "ablated"]
    command.add_argument(
        "--evals",
        choices=states,
        help="completions of evaluations instead",
    )
    spread = "rollouts printed, evenly spread over those chosen (default 5)"
    command.add_argument("--limit", type=at_least(0), default=5, help=spread)
    return command.parse_args()


def main() -> None:
    options = arguments()
    record = load_record(options.run)
    if options.evals is None:
        rows, kind = (
            load_rollouts(options.run),
            "rollouts (rollouts.jsonl.gz)",
        )
    else:
        rows = [row for row in load_evals(options.run) if row["state"] == options.evals]
        kind = f"evaluations (evals.jsonl.gz) in the state {options.evals}"
    if not rows:
        raise UserError(f"{options.run} holds no {kind}")
    rows = [row for row in rows if chosen(row, options)]
    step = max(1, -(-len(rows) // max(options.limit, 1)))
    printed = rows[::step] if options.limit else []
    print(*map(described, printed), sep="\n")
    print(summary(rows))
    name = f"{record.arm} seed {record.seed} ({record.status})"
    print(f"{name}: {len(rows)} rollouts chosen, {len(printed)} shown")


if __name__ == "__main__":
    try:
        run_main(main)
    except BrokenPipeError:  # the reader (head, less) has seen enough
        sys.stderr.close()
