"""A plan's table and tests, from the records of its wave.

The primary test is the exact two-sided sign-flip test of the mean paired difference in deployed
hacks; solving is the mean of validations at fixed steps, held against the ceiling with a lower
bound. A run that diverged enters with hack 1 and solve 0. What has not run is listed.

Run: python scripts/experiments/plan.py 01_label_free [--records DIR]
"""

import argparse
from pathlib import Path

import numpy as np
from scipy import stats
from scripts.experiments import criterion, records
from scripts.experiments.records import RECORDS
from scripts.experiments.waves import WAVES
from tabulate import tabulate

from vgrout.core import RunRecord, UserError, run_main
from vgrout.stats import noninferior

LEVEL = 0.95
EXACT_SEEDS = 20  # 2^20 sign patterns
Rates = dict[int, tuple[float, float]]  # seed → hack, solve


def sign_flip(differences: list[float]) -> float:
    """The exact two-sided p of a mean of paired differences: the share of all sign patterns whose
    mean is as far from 0 (Fisher 1935). Its least value with n seeds is 2^(1−n)."""
    n = len(differences)
    if not 1 <= n <= EXACT_SEEDS:
        raise ValueError(f"an exact test of {n} pairs: it takes 1 to {EXACT_SEEDS}")
    signs = 1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)
    sums = np.abs(signs @ np.asarray(differences))
    return float(np.mean(sums >= abs(sum(differences)) - 1e-12))


def interval(values: list[float]) -> str:
    """Mean and its 95 % t-interval over seeds."""
    middle = float(np.mean(values))
    if len(values) < 2:
        return f"{middle:.3f}"
    half = stats.sem(values) * stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)
    return f"{middle:.3f} [{middle - half:.3f}, {middle + half:.3f}]"


def validated_solve(record: RunRecord, steps: tuple[int, ...]) -> float:
    """Mean solve rate of the deployed policy's validations, novel markers, after these steps."""
    cells = {
        c.step: c.solve / c.n
        for c in record.evals
        if (c.split, c.markers, c.state) == ("val", "novel", "deployed")
    }
    if absent := set(steps) - cells.keys():
        raise UserError(f"{record.arm} s{record.seed} has no validation after step {min(absent)}")
    return float(np.mean([cells[step] for step in steps]))


def measured(wave: str, folder: Path) -> dict[str, Rates]:
    """Row → seed → rates."""
    contrast = WAVES[wave].contrast
    runs, diverged = records.load(records.files(wave, folder))
    found: dict[str, Rates] = {}
    for row in WAVES[wave].rows:
        found[row.name] = {seed: (1.0, 0.0) for seed in diverged.get(row.name, ())}
        for seed, record in runs.get(row.name, {}).items():
            solved = validated_solve(record, contrast.solve_at)
            found[row.name][seed] = criterion.hack(record), solved
    return found


def paired(found: dict[str, Rates], a: str, b: str, which: int) -> tuple[list, list]:
    """Rates of two rows on the seeds that both have: hack (0) or solve (1)."""
    shared = sorted(found[a].keys() & found[b].keys())
    return tuple([found[row][seed][which] for seed in shared] for row in (a, b))


def report(wave: str, folder: Path = RECORDS) -> str:
    """The table, the primary test, the bound on solving, and what has not run."""
    contrast, found = WAVES[wave].contrast, measured(wave, folder)
    table, absent = [], []
    for row in WAVES[wave].rows:
        rates = found[row.name]
        absent += [f"{row.name} s{seed}" for seed in row.seeds if seed not in rates]
        if rates:
            hacks, solved = (list(part) for part in zip(*rates.values(), strict=True))
            table.append([row.name, len(rates), interval(hacks), interval(solved)])
    lines = [tabulate(table, ["row", "seeds", "hack", "solve"], "github", disable_numparse=True)]
    first, second = contrast.first, contrast.second
    a, b = paired(found, first, second, 0)
    if a:
        differences = [x - y for x, y in zip(a, b, strict=True)]
        p, text = sign_flip(differences), interval(differences)
        lines.append(f"primary: hack of {first} − {second} {text}, {len(a)} seeds, p = {p:.4f}")
    a, b = paired(found, first, contrast.ceiling, 1)
    if len(a) > 1:
        holds, lower = noninferior(a, b, contrast.margin, contrast.level)
        word = "not inferior" if holds else "not shown to be as good"
        lines.append(
            f"solve of {first} − {contrast.ceiling} {np.mean(a) - np.mean(b):+.3f}, lower "
            f"{contrast.level:.1%} bound {lower:+.3f} (margin {contrast.margin}): {word}"
        )
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
