"""The bench says what it measured: medians, ratios of one round, the page's block.

No time is asserted. `--long` also runs one round of part b with two arms.

Run: python -m scripts.verify.verify_bench [--long]
"""

import json
import math
import sys
import tempfile
from pathlib import Path

from scripts.analysis import bench
from scripts.verify.stored import captured, refused

PAGE = f"before\n{bench.BEGIN}\nold\n{bench.END}\nafter\n"
STEP = {
    "sec_sample": 0.2,
    "sec_grade": 0.1,
    "sec_score": 0.0,
    "sec_update": 0.5,
    "sec_step": 1.0,
}
STEP |= {
    "n_students": 40,
    "completion_length": 50.0,
    "tokens_per_second": 10.0,
}
STEP |= {"groups_skipped": 1}
VERSIONS = {"python": "3", "torch": "2"}
MACHINE = {
    "cpu": "a CPU",
    "cores": 2,
    "threads": 1,
    "load": 0.1,
    "commit": "c" * 40,
}
MACHINE |= {"dirty": False, "versions": VERSIONS, "made": "then"}


def check_arithmetic() -> None:
    """Planted times come out as they were planted. Mutation: ratios to another round."""
    refreshing = STEP | {"sec_refresh": 2.0, "sec_step": 3.0}
    for row in (bench.spent(STEP, 0.4), bench.spent(refreshing, 0.4)):
        assert math.isclose(row["other"], 0.2) and math.isclose(row["step"], 1.4), row
        assert row["refresh"] == 0.4 and row["tokens"] == 2000
    slow = bench.spent(refreshing | {"sec_step": 4.0}, 0.4)
    assert slow["step"] > 2.3, "a slow step goes unnoticed"
    slowed = (1.0, 3.0, 2.0)  # the machine's noise is shared
    rounds = [{"a": {"step": 2 * x}, "b": {"step": x}} for x in slowed]
    assert bench.ratios(rounds, "a", "b", "step") == [2.0] * 3
    for this, other in zip(mixed := [dict(r) for r in rounds], slowed[::-1]):
        this["b"] = {"step": other}
    assert bench.ratios(mixed, "a", "b", "step") != [2.0] * 3, "ratios SHOULD be of one round"
    assert bench.spread([3.0, 1.0, 2.0]) == "2.00 [1.00, 3.00]" and bench.spread([1.0]) == "1.00"
    print("ok  phases, a refresh spread over its cadence, ratios of one round")


def planted(one: str, other: str) -> dict:
    """Two rounds in which the second side takes three times as long."""
    step = dict.fromkeys((*bench.PHASES, "tokens", "tokens_per_second", "resident"), 1.0)
    step |= {"groups_skipped": 1.0, "step": 0.6}
    return {
        "machine": MACHINE,
        "rounds": [{one: step, other: step | {"step": 1.8}}] * 2,
    }


def check_tables() -> None:
    """Planted ratios stand in the tables; a part without figures says TODO; the page keeps both."""
    found = {"b": planted("absorb", "routeV")}
    text = bench.render(found)
    assert text.count("3.00 [3.00, 3.00]") == 1 and text.count("TODO") == 1
    text = bench.render(found := found | {"a": planted(bench.OURS, bench.THEIRS)})
    assert text.count("3.00 [3.00, 3.00]") == 2 and "TODO" not in text
    once = bench.replaced(PAGE, text)
    assert bench.replaced(once, text) == once == PAGE.replace("old", text)
    for broken in ("", PAGE.replace(bench.END, ""), PAGE * 2):
        refused("--write", bench.replaced, broken, text)
    with tempfile.TemporaryDirectory() as folder:
        out, page = Path(folder) / "bench.json", Path(folder) / "page.md"
        refused(
            "nothing to show",
            bench.main,
            bench.Args(measure=False, out=out),
        )
        out.write_text(json.dumps(found))
        page.write_text(PAGE)
        said = captured(bench.main, bench.Args(measure=False, out=out, write=page))
        assert page.read_text() == once and text in said
    print("ok  planted ratios stand in the tables, the tables in the page")


def check_script() -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bench.json"
        args = bench.Args(
            only=("b",),
            rounds=1,
            steps=1,
            arms=("absorb", "routeV"),
            out=out,
        )
        captured(bench.main, args)
        (sides,) = json.loads(out.read_text())["b"]["rounds"]
    assert all(row["update"] > 0 and row["resident"] > 0 for row in sides.values())
    print("ok  a round of part b runs")


if __name__ == "__main__":
    check_arithmetic()
    check_tables()
    if "--long" in sys.argv:
        check_script()
