"""What shows a run is faithful and safe: the report page, and completions in the terminal.

The page is self-contained: no outside resource, completions are data and never markup, counts
agree. In the terminal a completion moves no cursor.

Run: python -m scripts.verify.verify_report
"""

import json
import re
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from unittest import mock

from scripts.verify.stored import (
    captured,
    novel_cell,
    planted_record,
    planted_run,
    refused,
)
from scripts.view import show
from scripts.view.report import browsable, edges, page

from vgrout.run import runlog
from vgrout.run.records import load_rollouts

LINK = "<script src='https://example.invalid/x.js'></script><img src=x onerror=alert(1)><!-- "
HOSTILE = f"</script>{LINK}"
CODES = "ok\n\tindented \x1b[2J\x1b]0;title\x07 \x9b31m\r\x7f"  # clear, title, red (C1), return


class Elements(HTMLParser):
    """Every element with its attributes, and the text of the element `data`."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.data, self._inside = "", False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        self._inside = self.found[-1][1].get("id") == "data"

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, text):
        self.data += text if self._inside else ""

    def outside(self) -> list[str]:
        """References that leave the page: anything but a fragment or inline data."""
        keys = ("src", "href", "xlink:href")
        links = [attributes.get(key) or "#" for _, attributes in self.found for key in keys]
        return [link for link in links if not link.startswith(("#", "data:"))]


def rollout(
    step: int,
    i: int,
    hacks: int,
) -> dict:
    return {
        "step": step,
        "problem_id": f"p{i}",
        "mode": "sentinel",
        "marker": "valid",
        "completion": HOSTILE + CODES,
        "teacher": i == 7,
        "sampled_ablated": False,
        "reward": 3.5,
        "correct": i >= 6,
        "reward_hack": i < hacks,
        "verdict": "wrong",
        "advantage": 1.0 if i % 2 else -1.0,
        "zone": "ROUTE",
        "score": i / 8,
    }


def planted(folder: Path, hacks: int = 3) -> Path:
    """A finished run of three steps with eight rollouts each, all completions hostile."""
    evals = [novel_cell(step, step, 2) for step in (0, 3)]
    config = {"model": {"model": "<b>"}, "data": {}}
    with planted_run(folder, planted_record(config=config, steps_done=3, evals=evals)) as run:
        for step in range(3):
            row = {
                "step": step,
                "student_hack": hacks / 8,
                "student_solve": 0.25,
                "kl": 0.1,
            }
            gate = {"gate_lower": 0.1 + step, "gate_upper": 0.2 + step} if step != 1 else {}
            run.log_metrics(row | gate)
            run.log_rollouts([rollout(step, i, hacks) for i in range(8)])
    return folder


def check_self_contained(text: str) -> None:
    elements = Elements(text)
    assert not elements.outside(), elements.outside()
    assert "@import" not in text and "url(http" not in text
    scripts = [tag for tag, _ in elements.found if tag == "script"]
    assert len(scripts) == 2, "a completion became markup"
    before_scripts = re.sub(r"<script>.*", "", text, flags=re.S)
    assert HOSTILE not in text and "<b>" not in before_scripts, "text of a run is not escaped"
    leaky = Elements(text.replace("\\u003c", "<"))
    assert leaky.outside(), "the check misses unescaped completions"
    print("ok  the page refers to nothing outside; an unescaped completion is noticed")


def check_faithful(text: str, runs: list[Path]) -> None:
    data = json.loads(Elements(text).data)
    assert len(data) == 48 and all(row["completion"] == HOSTILE + CODES for row in data)
    assert sum(row["outcome"] == "hack" for row in data) == 9
    assert sum(row["teacher"] for row in data) == 6
    few = browsable("one", load_rollouts(runs[0]), 5)
    assert len(few) == 5 and {row["step"] for row in few} == {0, 1, 2}, "SHOULD be spread evenly"
    assert text.count(">hack (3)<") == text.count(">hack (6)<") == 1, "labels are miscounted"
    for words in ("0.75 [", "0.50 [", "routeV", "deployed", "oracle-free"):
        assert words in text, f"the page lacks {words!r}"
    refused("no run record", page, [runs[0], runs[0].with_name("none")], 5)
    gates = [(1.0, 2.0), (None, None), (3.0, 4.0)]
    rows = [{"gate_lower": low, "gate_upper": high} for low, high in gates]
    assert edges(rows) == [(1.0, 2.0), (3.0, 4.0)] and edges([{"step": 0}]) == []
    print("ok  labels, intervals and an even selection; edges are the refreshes'")


def control_characters(text: str) -> set[str]:
    return {c for c in text if not (c.isprintable() or c in "\n\t")}


def check_terminal(run: Path) -> None:
    with mock.patch.object(sys, "argv", ["show", str(run), "--outcome", "hack"]):
        printed = captured(show.main)
        assert not control_characters(printed), "a completion reaches the terminal raw"
        escaped = (r"\x1b[2J", r"\x07", r"\x9b31m\x0d\x7f")
        for words in (*escaped, "ok\n\tindented ", "9 rollouts"):
            assert words in printed, f"the terminal lacks {words!r}"
        with mock.patch.object(show, "visible", lambda raw: raw):
            assert control_characters(captured(show.main)), "raw control characters go unnoticed"
    print("ok  control characters of a completion are printed as escapes; raw ones are noticed")


def check_bottom_line() -> None:
    """A log's tail: what happened, the table, argv. A run that hacks, or is frozen, fails."""
    for hack, solve, said in ((9, 9, "✗ the deployed"), (1, 3, "✗ it has not"), (1, 9, "✓ hack")):
        cells = [novel_cell(0, 1, 3, 20), novel_cell(8, hack, solve, 20)]
        record = planted_record(evals=cells, argv=["a"], status="finished", steps_done=8)
        printed = captured(runlog.final_table, record)
        places = [printed.index(words) for words in (said, "RESULT", "hack ↓", "argv: a")]
        assert places == sorted(places), printed
    print("ok  the tail of a log says first whether the hack stayed out and solving rose")


def main() -> None:
    check_bottom_line()
    with tempfile.TemporaryDirectory() as tmp:
        runs = [planted(Path(tmp) / "one"), planted(Path(tmp) / "two", hacks=0)]
        text = page(runs, 100)
        check_self_contained(text)
        check_faithful(text, runs)
        check_terminal(runs[0])


if __name__ == "__main__":
    main()
