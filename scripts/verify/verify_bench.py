"""The bench says what it measured: phases, medians, ratios of one round.

No time is asserted. `--long` also runs one round of part b with two arms, and of part c.

Run: python -m scripts.verify.verify_bench [--long]
"""

import json
import math
import sys
import tempfile
from pathlib import Path

from scripts.analysis import bench
from scripts.verify.stored import captured

STEP = {
    "sec_sample": 0.2,
    "sec_grade": 0.1,
    "sec_score": 0.0,
    "sec_update": 0.5,
    "sec_step": 1.0,
    "n_students": 40,
    "completion_length": 50.0,
    "tokens_per_second": 10.0,
    "groups_skipped": 1,
}


def check_phases() -> None:
    """Planted times come out as they were planted, a refresh spread over its cadence."""
    refreshing = STEP | {"sec_refresh": 2.0, "sec_step": 3.0}
    for row in (bench.spent(STEP, 0.4), bench.spent(refreshing, 0.4)):
        assert math.isclose(row["other"], 0.2) and math.isclose(row["step"], 1.4), row
        assert row["refresh"] == 0.4 and row["tokens"] == 2000
    slow = bench.spent(refreshing | {"sec_step": 4.0}, 0.4)
    assert slow["step"] > 2.3, "a slow step goes unnoticed"
    print("ok  phases, a refresh spread over its cadence")


def check_ratios() -> None:
    """The machine's noise is shared within a round. Mutation: ratios to another round."""
    noise = (1.0, 3.0, 2.0)
    rounds = [{"one": {"step": x}, "other": {"step": 2 * x}} for x in noise]
    text = bench.side_by_side(rounds)
    assert "4.000 [2.000, 6.000]" in text and "2.00 [2.00, 2.00]" in text, text
    for sides, x in zip(rounds, noise[::-1]):
        sides["one"] = {"step": x}
    assert "2.00 [2.00, 2.00]" not in bench.side_by_side(rounds), "ratios SHOULD be of one round"
    said = bench.render({})
    assert said.count("TODO") == len(bench.MEASURED), "a part without figures SHOULD say so"
    print("ok  ratios of one round stand in the table")


def check_script() -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bench.json"
        line = f"--only b c --rounds 1 --steps 1 --arms absorb routeV --out {out}"
        captured(bench.main, line.split())
        found = json.loads(out.read_text())
    (sides,) = found["b"]["rounds"]
    assert all(row["update"] > 0 and row["resident"] > 0 for row in sides.values())
    print("ok  a round of parts b and c runs")


if __name__ == "__main__":
    check_phases()
    check_ratios()
    if "--long" in sys.argv:
        check_script()
