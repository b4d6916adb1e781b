"""The bench says what it measured: medians, paired ratios, exponents, turns, the page's block.

No time is asserted. `--long` also runs the whole script once with --quick.

    uv run python scripts/verify/verify_bench.py [--long]
"""

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

from scripts.analysis import bench
from scripts.analysis.bench_turns import take_turns
from scripts.verify.stored import captured, refused

PAGE = f"before\n{bench.BEGIN}\nold\n{bench.END}\nafter\n"
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
CHILD = """
import os, sys, time
from scripts.analysis.bench_turns import wait_for_turn
go, done = map(int, os.environ["BENCH_TURN"].split())
for i in range(20):
    start = time.monotonic()
    time.sleep(0.01)
    with open(sys.argv[1], "a") as file:
        file.write(f"{start} {time.monotonic()}\\n")
    WAIT
while os.read(go, 1):
    pass
"""


def check_arithmetic() -> None:
    """Planted times come out as they were planted. Mutation: ratios to another repeat."""
    refreshing = STEP | {"sec_refresh": 2.0, "sec_step": 3.0}
    plain, refreshed = bench.spent(STEP, 0.4), bench.spent(refreshing, 0.4)
    for row in (plain, refreshed):
        assert math.isclose(row["other"], 0.2) and math.isclose(row["step"], 1.4), row
        assert row["refresh"] == 0.4
    assert (plain["refreshed"], refreshed["refreshed"]) == (0.0, 2.0)
    slow = bench.spent(refreshing | {"sec_step": 4.0}, 0.4)
    assert slow["step"] > plain["step"] + 0.9, "a slow step goes unnoticed"
    noisy = [2.0, 6.0, 4.0], [1.0, 3.0, 2.0]  # the machine's noise is shared
    assert bench.ratios(*noisy) == [2.0] * 3
    assert bench.ratios(noisy[0], noisy[1][::-1]) != [2.0] * 3, "ratios SHOULD be of neighbours"
    assert bench.spread([3.0, 1.0, 2.0]) == "2.00 [1.00, 3.00]" and bench.spread([1.0]) == "1.00"
    assert math.isclose(bench.exponent(1.0, 8.0, 4.0), 1.5) and bench.exponent(1.0, 1.0, 4.0) == 0
    print("ok  phases, a refresh spread over its cadence, ratios of neighbours, exponents")


def overlaps(wait: str) -> bool:
    """Whether steps of two children were ever under way at the same time."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in "ab"]
        commands = {f.name: ["-c", CHILD.replace("WAIT", wait), str(f)] for f in files}
        _, cpu = take_turns(commands, 4, 1)
        assert all(len(seconds) == 4 for seconds in cpu.values())
        steps = [f.read_text().split() for f in files]
    a, b = ([tuple(map(float, s[i : i + 2])) for i in range(0, len(s), 2)] for s in steps)
    assert len(a) >= 5 and len(b) >= 5
    return any(x < end and y < until for x, until in a for y, end in b)


def check_turns() -> None:
    """Steps of runs that take turns never overlap. Mutation: children that do not wait."""
    assert not overlaps("wait_for_turn()")
    impatient = "os.write(done, bytes(8)) if i else wait_for_turn()"
    assert overlaps(impatient), "runs that do not wait go unnoticed"
    print("ok  runs that take turns never work at the same time; others are noticed")


def check_tables() -> None:
    """Planted ratios and exponents stand in the tables; a part without figures says TODO."""
    step = {phase: 0.1 for phase in bench.PHASES} | {"step": 0.6, "tokens": 2000.0}
    step |= {"tokens_per_second": 9000.0, "groups_skipped": 1.0}
    three = [step | {"step": 1.8, "update": 0.8}] * 2
    versions = {"python": "3", "torch": "2", "transformers": "5"}
    machine = {
        "cpu": "a CPU",
        "cores": 2,
        "threads": 1,
        "load": 0.1,
        "commit": "c" * 40,
    }
    head = {"machine": machine | {"dirty": False, "versions": versions}, "made": "then"}

    def pair(one: str, other: str) -> dict:
        runs, cpu = (
            {one: [step] * 2, other: three},
            {one: [1.0, 1.0], other: [1.0, 4.0]},
        )
        return head | {"runs": runs, "cpu": cpu, "resident": {one: 1.0, other: 2.0}}

    grown = {"more": {"arm": "routeV", "factor": 2.0, "phases": ["update"]}}
    found = {
        "a": pair(bench.OURS, bench.THEIRS) | {"versions": {"trl": "1"}},
        "b": pair("absorb", "routeV"),
    }
    text = bench.render(found)
    assert "3.00 [3.00, 3.00]" in text and "| 2.50" in text and text.count("TODO") == 1
    text = bench.render(found | {"c": pair("routeV", "more") | {"grown": grown}})
    assert "3.00 [3.00, 3.00]" in text.split("Growth")[1] and "TODO" not in text
    check_page(found)
    print("ok  planted ratios and exponents stand in the tables, the tables in the page")


def check_page(found: dict) -> None:
    """The page's block is the tables and nothing else changes; else one line says why not."""
    text = bench.render(found)
    once = bench.replaced(PAGE, text)
    assert bench.replaced(once, text) == once == PAGE.replace("old", text)
    for broken in ("", PAGE.replace(bench.END, ""), PAGE * 2):
        refused("--write", bench.replaced, broken, text)
    with tempfile.TemporaryDirectory() as folder:
        out, page = Path(folder) / "bench.json", Path(folder) / "page.md"
        refused("nothing to show", bench.main, bench.Args(measure=False, out=out))
        out.write_text(json.dumps(found))
        page.write_text(PAGE)
        said = captured(bench.main, bench.Args(measure=False, out=out, write=page))
        assert page.read_text() == once and text in said


def check_script() -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bench.json"
        command = [
            sys.executable,
            "scripts/analysis/bench.py",
            "--quick",
            "--rounds",
            "1",
        ]
        subprocess.run([*command, "--out", str(out)], check=True, stdout=subprocess.DEVNULL)
        found = json.loads(out.read_text())
    assert found.keys() == {"b", "c"}
    for part in found.values():
        for steps in part["runs"].values():
            assert all(row["update"] > 0 and row["tokens"] > 0 for row in steps)
    print("ok  scripts/analysis/bench.py --quick runs its parts b and c")


if __name__ == "__main__":
    if "--long" in sys.argv:
        check_script()
    else:
        for check in (check_arithmetic, check_turns, check_tables):
            check()
