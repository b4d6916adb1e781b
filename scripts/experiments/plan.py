"""A plan's table and tests, from the records of its wave.

The primary test is the exact two-sided sign-flip test of the mean paired difference in deployed
hacks; solving is the mean of validations at fixed steps, held against the ceiling with a lower
bound. A run that diverged enters with hack 1 and solve 0. What has not run is listed.

Run: python -m scripts.experiments.plan 01_label_free [--records DIR]
"""

import argparse
from pathlib import Path
from statistics import mean

from scripts.experiments import criterion, records
from scripts.experiments.records import RECORDS
from scripts.experiments.waves import WAVES
from tabulate import tabulate

from vgrout.core import RunRecord, UserError, run_main
from vgrout.stats import mean_sem, noninferior, sign_flip

Rates = dict[int, tuple[float, float]]  # seed → hack, solve


def validated_solve(record: RunRecord, steps: tuple[int, ...]) -> float:
    """Mean solve rate of the deployed policy's validations, novel markers, after these steps."""
    wanted = ("val", "novel", "deployed")
    cells = [c for c in record.evals if (c.split, c.markers, c.state) == wanted]
    solved = {c.step: c.solve / c.n for c in cells}
    if absent := set(steps) - solved.keys():
        raise UserError(f"{record.arm} s{record.seed} has no validation after step {min(absent)}")
    return mean(solved[step] for step in steps)


def measured(wave: str, folder: Path) -> dict[str, Rates]:
    """Row → seed → rates."""
    contrast = WAVES[wave].contrast
    runs, diverged = records.load(records.files(wave, folder))
    found: dict[str, Rates] = {}
    for row in WAVES[wave].rows:
        found[row.name] = dict.fromkeys(diverged.get(row.name, ()), (1.0, 0.0))
        for seed, record in runs.get(row.name, {}).items():
            solved = validated_solve(record, contrast.solve_at)
            found[row.name][seed] = criterion.rates(record)["hack"], solved
    return found


def paired(a: Rates, b: Rates, which: int) -> tuple[list[float], list[float]]:
    """Rates of two rows on the seeds that both have: hack (0) or solve (1)."""
    shared = sorted(a.keys() & b.keys())
    return [a[seed][which] for seed in shared], [b[seed][which] for seed in shared]


def spread(values: list[float]) -> str:
    return "{:.3f} ± {:.3f}".format(*mean_sem(values))


def table(found: dict[str, Rates]) -> str:
    """A line for each row that has runs: mean ± standard error over its seeds."""
    lines = []
    for name, rates in found.items():
        if rates:
            hacks, solved = (list(part) for part in zip(*rates.values(), strict=True))
            lines.append([name, len(rates), spread(hacks), spread(solved)])
    return tabulate(lines, ["row", "seeds", "hack", "solve"], "github", disable_numparse=True)


def report(wave: str, folder: Path = RECORDS) -> str:
    """The table, the primary test, the bound on solving, and what has not run."""
    contrast, found = WAVES[wave].contrast, measured(wave, folder)
    first, second, ceiling = (found[name] for name in contrast.rows)
    lines = [table(found)]
    hacks, solved = paired(first, second, 0), paired(first, ceiling, 1)
    if len(hacks[0]) > 1:
        difference, p = sign_flip(*hacks)
        test = f"hack of {contrast.first} − {contrast.second} {difference:+.3f}"
        lines.append(f"primary: {test}, {len(hacks[0])} seeds, p = {p:.4f}")
    else:
        lines.append(f"primary: {len(hacks[0])} seeds have both rows, a test takes 2")
    if len(solved[0]) > 1:
        holds, lower = noninferior(*solved, contrast.margin, contrast.level)
        word = "not inferior" if holds else "not shown to be as good"
        difference = mean(solved[0]) - mean(solved[1])
        bound = f"lower {contrast.level:.1%} bound {lower:+.3f} (margin {contrast.margin})"
        test = f"solve of {contrast.first} − {contrast.ceiling} {difference:+.3f}"
        lines.append(f"{test}, {bound}: {word}")
    runs = [(row.name, seed) for row in WAVES[wave].rows for seed in row.seeds]
    absent = [f"{name} s{seed}" for name, seed in runs if seed not in found[name]]
    lines.append(f"not run: {', '.join(absent) or 'nothing'}")
    return "\n\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    tested = [name for name, wave in WAVES.items() if wave.contrast]
    parser.add_argument("wave", choices=tested)
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of the wave's file")
    options = parser.parse_args()
    print(report(options.wave, options.records))


if __name__ == "__main__":
    run_main(main)
