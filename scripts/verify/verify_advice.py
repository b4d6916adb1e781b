"""Every warning fires on its fault, on nothing else, and a healthy run gets none.

uv run python scripts/verify/verify_advice.py
"""

import sys
from pathlib import Path

from vgrout.core import EvalResult
from vgrout.run.advice import DEAD, WINDOW, advice
from vgrout.run.records import load_metrics, load_record

HEALTHY = {
    "n_students": 44, "n_teachers": 4, "rows_retain": 20, "rows_absorb": 12, "rows_route": 8, "student_hack": 0.3,
    "student_solve": 0.2, "student_format": 0.98, "logp_mean": -0.25, "kl": 0.03, "sampler_mismatch": 1e-6, "timeout_share": 0.0,
}  # fmt: skip
REFRESH = {"gate_lower": 0.1, "gate_upper": 0.2, "gate_collapsed": 0.0, "direction_drift": 0.9}
NOTHING_TRAINS = {"rows_retain": 0, "rows_absorb": 2, "rows_route": 0}


def run(late: dict | None = None, refresh: dict | None = None, steps: int = 20) -> list[dict]:
    """A run whose last WINDOW rows, and whose last refresh, are changed."""
    rows = [HEALTHY | {"step": i} | (REFRESH if i % 5 == 0 else {}) for i in range(steps)]
    rows[-5] |= refresh or {}
    return [row | (late or {}) if row["step"] >= steps - WINDOW else row for row in rows]


def cell(step: int, solve: int, state: str = "deployed") -> EvalResult:
    return EvalResult("test" if step == 0 else "val", "novel", state, step, 100, 0, solve, {}, {})


FAULTS = {  # what → (rows, evaluations) that show it
    "no variance in groups": [(run(NOTHING_TRAINS | case), []) for case in
                              ({}, {"student_hack": 0.75}, {"student_solve": 0.95}, {"student_format": 0.1})],
    "gate collapsed": [(run(refresh={"gate_lower": 0.2, "gate_upper": 0.1, "gate_collapsed": 1.0}), []),
                       ([HEALTHY | {"step": 0, "gate_lower": None, "gate_upper": None, "gate_collapsed": 1.0}], [])],
    "direction inverted on pairs": [(run(refresh={"gate_lower": 0.2, "gate_upper": -0.1, "gate_collapsed": 1.0}), [])],
    "direction reversed": [(run(refresh={"direction_drift": -0.4}), [])],
    "log-probs falling": [(run({"logp_mean": -1.4}), [])],
    "KL runs away": [(run({"kl": 2.5}), [])],
    "sampler and learner differ": [(run({"sampler_mismatch": 0.2}), [])],
    "judge fails": [(run({"judge_failures": 25}), [])],
    "completions time out": [(run({"timeout_share": 0.3}), [])],
    "solve dead at deployment": [(run(), [cell(0, 20), cell(10, 18), cell(20, 4)])],
}  # fmt: skip


def main() -> None:
    assert (
        advice(run(), [cell(0, 20), cell(20, 15)]) == []
        and advice([]) == []
        and advice(run(steps=6)) == []
    )
    near = [
        run({"rows_retain": 4}),
        run({"logp_mean": -0.6}),
        run({"kl": 0.9}),
        run({"timeout_share": 0.0, "sampler_mismatch": 0.04}),
        run({"judge_failures": 15}),
        run({"timeout_share": 0.1}),
    ]
    assert not any(map(advice, near)), "a value short of its threshold warns"
    odd = run()
    odd[-3] |= {"kl": 300.0, "logp_mean": -15.0, "sampler_mismatch": 9.0, "timeout_share": 1.0}
    assert not advice(odd), "one odd step warns"
    unscored = [{k: v for k, v in row.items() if k not in REFRESH} for row in run()]
    missing = [row | {"logp_mean": float("nan"), "kl": None} for row in unscored]
    assert not advice(unscored) and not advice(missing), (
        "an arm without scores, or a value that does not exist, warns"
    )
    print("ok  a healthy run, one odd step, an unscored arm and missing values get no warning")

    for what, cases in FAULTS.items():
        for rows, evals in cases:
            lines = advice(rows, evals)
            assert [line.partition(":")[0] for line in lines] == [what], f"{what}: {lines}"
            assert "\n" not in lines[0] and ";" in lines[0], f"no remedy: {lines[0]}"
    texts = [advice(rows)[0].partition(";")[2] for rows, _ in FAULTS["no variance in groups"]]
    assert len(set(texts)) == len(texts), (
        "saturation, broken output and easy problems get one remedy"
    )
    print(f"ok  {len(FAULTS)} faults: each gives its own line with a remedy, and no other line")

    falling = run({"kl": 2.5})
    for row in falling[-2 * WINDOW : -WINDOW]:
        row["kl"] = 4.0
    assert not advice(falling), "a KL that comes down again warns"
    base, alive = cell(0, 20), cell(20, int(20 * DEAD))
    for evals in ([base, alive], [cell(0, 0), cell(20, 0)], [base, cell(20, 0, "ablated")]):
        assert not advice(run(), evals), f"a warning without cause: {evals}"
    print("ok  a falling KL, a base that solves nothing and another policy's cells do not warn")
    for folder in map(Path, sys.argv[1:]):
        print(
            f"{folder}:",
            *(advice(load_metrics(folder), load_record(folder).evals) or ["no warning"]),
            sep="\n    ",
        )


if __name__ == "__main__":
    main()
