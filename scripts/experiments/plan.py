"""A plan's table and tests, from the records of its wave.

The primary test is the exact two-sided sign-flip test of the mean paired difference in deployed
hacks; solving is the mean of validations at fixed steps, held against the ceiling with a lower
bound. A run that diverged enters with hack 1 and solve 0. What has not run is listed.

Run: python -m scripts.experiments.plan 01_label_free [--records DIR]
"""

from collections.abc import Iterator
from pathlib import Path
from statistics import mean

from scripts.experiments import records
from scripts.experiments.records import BOTH, RECORDS
from scripts.experiments.waves import WAVES, Contrast
from scripts.view.output import OUT, parser, table
from scripts.view.plot import draw_rows

from vgrout.core import RunRecord, UserError, run_main
from vgrout.stats import noninferior, sign_flip

Rates = dict[int, dict[str, float]]  # seed → hack, solve
LOST = {"hack": 1.0, "solve": 0.0}  # of a run that diverged


def validated_solve(record: RunRecord, steps: tuple[int, ...]) -> float:
    """Mean solve rate of the deployed policy's validations, novel markers, after these steps."""
    solved = {}
    for result in records.cells(record, "val"):
        solved[result.step] = records.share(result, "solve")
    if absent := set(steps) - solved.keys():
        raise UserError(f"{record.arm} s{record.seed} has no validation after step {min(absent)}")
    return mean(solved[step] for step in steps)


def measured(wave: str, folder: Path) -> dict[str, Rates]:
    """Row → seed → rates."""
    runs, diverged = records.load(records.files(wave, folder))
    steps = WAVES[wave].contrast.solve_at
    rates: dict[str, Rates] = {}
    for row in WAVES[wave].rows:
        lost = diverged.get(row.name, [])
        own = dict.fromkeys(lost, LOST)
        for seed, record in runs.get(row.name, {}).items():
            hack = records.share(records.cell(record), "hack")
            own[seed] = {
                "hack": hack,
                "solve": validated_solve(record, steps),
            }
        rates[row.name] = own
    return rates


def column(rates: Rates, which: str) -> list[float]:
    return [own[which] for own in rates.values()]


def paired(a: Rates, b: Rates, which: str) -> list[list[float]]:
    """Rates of two rows on the seeds that both have."""
    shared = sorted(a.keys() & b.keys())
    return [[row[seed][which] for seed in shared] for row in (a, b)]


def tests(contrast: Contrast, rates: dict[str, Rates]) -> Iterator[str]:
    """The primary test, and the bound on solving, on the seeds that both rows have."""
    first = rates[contrast.first]
    a, b = paired(first, rates[contrast.second], "hack")
    if len(a) < 2:
        yield f"primary: {len(a)} seeds have both rows, a test takes 2"
    else:
        difference, p = sign_flip(a, b)
        what = f"hack of {contrast.first} − {contrast.second} {difference:+.3f}"
        yield f"primary: {what}, {len(a)} seeds, p = {p:.4f}"
    a, b = paired(first, rates[contrast.ceiling], "solve")
    if len(a) > 1:
        margin, level = contrast.margin, contrast.level
        holds, lower = noninferior(a, b, margin, level)
        what = f"solve of {contrast.first} − {contrast.ceiling} {mean(a) - mean(b):+.3f}"
        bound = f"lower {level:.1%} bound {lower:+.3f} (margin {margin})"
        said = "not inferior" if holds else "not shown to be as good"
        yield f"{what}, {bound}: {said}"


def report(wave: str, folder: Path = RECORDS) -> str:
    """A line for each row that has runs, the tests, and what has not run."""
    planned, rates = WAVES[wave], measured(wave, folder)
    rows, absent = [], []
    for row in planned.rows:
        own = rates[row.name]
        if own:
            spread = [records.spread(column(own, which)) for which in BOTH]
            rows.append([row.name, len(own), *spread])
        absent += [f"{row.name} s{seed}" for seed in row.seeds if seed not in own]
    headers = ["row", "seeds", *BOTH]
    parts = [
        table(rows, headers, "github"),
        *tests(planned.contrast, rates),
        f"not run: {', '.join(absent) or 'nothing'}",
    ]
    return "\n\n".join(parts)


def main() -> None:
    command = parser(__doc__)
    tested = [name for name in WAVES if WAVES[name].contrast]
    command.add_argument("wave", choices=tested)
    where = "folder of the wave's file"
    command.add_argument(
        "--records",
        type=Path,
        default=RECORDS,
        help=where,
    )
    options = command.parse_args()
    print(report(options.wave, options.records))
    rates = measured(options.wave, options.records)
    own = {row: {w: column(found, w) for w in BOTH} for row, found in rates.items() if found}
    draw_rows(own, OUT / "figs" / f"{options.wave}.png")


if __name__ == "__main__":
    run_main(main)
