"""The report page is self-contained and faithful: no outside resource, completions are data and never markup, counts agree.

uv run python scripts/verify/verify_report.py
"""

import json
import re
import tempfile
from html.parser import HTMLParser
from pathlib import Path

from scripts.view.report import browsable, edges, page

from vgrout.core import EvalResult, RunRecord, UserError
from vgrout.run.provenance import provenance
from vgrout.run.records import Run, load_rollouts

HOSTILE = (
    "</script><script src='https://example.invalid/x.js'></script><img src=x onerror=alert(1)><!-- "
)


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


def outside(elements: Elements) -> list[tuple[str, str]]:
    """References that leave the page: anything but a fragment or inline data."""
    links = [
        (tag, attributes.get(key) or "")
        for tag, attributes in elements.found
        for key in ("src", "href", "xlink:href")
    ]
    return [(tag, link) for tag, link in links if link and not link.startswith(("#", "data:"))]


def planted(folder: Path, hacks: int = 3) -> Path:
    """A finished run of three steps with eight rollouts each, all completions hostile."""
    by_mode = lambda s: {"sentinel": {"n": 4, "hack": s, "solve": 2}}  # noqa: E731
    cells = [
        EvalResult("test", "novel", "deployed", s, 4, s, 2, by_mode(s), {"p": [4, s, 2]})
        for s in (0, 3)
    ]
    record = RunRecord(
        schema_version=1, arm="routeV", preset="smoke", seed=41, config={"model": {"model": "<b>"}, "data": {}}, data_hashes={},
        pair_hash="", split_hashes={}, sandbox_layers={}, status="running", steps_done=3, evals=cells,
        notes={"oracle": False, "deployed": "ablated"}, **provenance(),
    )  # fmt: skip
    run = Run.create(folder, record, resume=False)
    for step in range(3):
        row = {
            "step": step,
            "student_hack": hacks / 8,
            "student_solve": 0.25,
            "share_route": 0.1,
            "kl": 0.1,
        }
        run.log_metrics(
            row | ({"gate_lower": 0.1 + step, "gate_upper": 0.2 + step} if step != 1 else {})
        )
        run.log_rollouts([
            {"step": step, "problem_id": f"p{i}", "mode": "sentinel", "marker": "valid", "completion": HOSTILE, "teacher": i == 7,
             "sampled_ablated": False, "reward": 3.5, "correct": i >= 6, "reward_hack": i < hacks, "verdict": "wrong",
             "advantage": 1.0 if i % 2 else -1.0, "zone": "ROUTE", "score": i / 8}
            for i in range(8)
        ])  # fmt: skip
    run.finish("finished")
    run.close()
    return folder


def main() -> None:
    with tempfile.TemporaryDirectory() as tmp:
        runs = [planted(Path(tmp) / "one"), planted(Path(tmp) / "two", hacks=0)]
        text = page(runs, 100)
        elements = Elements(text)
        assert not outside(elements) and "@import" not in text and "url(http" not in text, outside(
            elements
        )
        assert sum(tag == "script" for tag, _ in elements.found) == 2, "a completion became markup"
        assert HOSTILE not in text and "<b>" not in re.sub(r"<script>.*", "", text, flags=re.S), (
            "text of a run is not escaped"
        )
        leaky = Elements(text.replace("\\u003c", "<"))
        assert outside(leaky), "the check misses unescaped completions"
        print(
            "ok  the page refers to nothing outside; a hostile completion stays text, and unescaped it is noticed"
        )

        data = json.loads(elements.data)
        assert len(data) == 48 and all(row["completion"] == HOSTILE for row in data)
        assert (
            sum(row["outcome"] == "hack" for row in data) == 9
            and sum(row["teacher"] for row in data) == 6
        )
        few = browsable("one", load_rollouts(runs[0]), 5)
        assert len(few) == 5 and {row["step"] for row in few} == {0, 1, 2}, (
            "the kept completions are not spread over the run"
        )
        assert text.count(">hack (1)<") == 3 and text.count(">hack (2)<") == 3, (
            "labels or signs are miscounted"
        )
        for words in ("0.75 [", "0.50 [", "routeV", "deployed", "oracle-free"):
            assert words in text, f"the page lacks {words!r}"
        print(
            "ok  every completion is there with its label, the limit keeps an even selection, the 2×2 table has intervals"
        )

        rows = [
            {"step": 0, "gate_lower": 1.0, "gate_upper": 2.0},
            {"step": 1},
            {"step": 2, "gate_lower": 3.0, "gate_upper": 4.0},
        ]
        assert (
            edges(rows, range(1, 3)) == [(1.0, 2.0), (3.0, 4.0)]
            and edges([{"step": 0}], range(1)) == []
        )
        try:
            page([runs[0], Path(tmp) / "none"], 5)
            raise AssertionError("a missing run was reported on")
        except UserError as error:
            assert "no run record" in str(error)
        print(
            "ok  the cut points of a step are those of the refresh before it; a missing run is one line"
        )


if __name__ == "__main__":
    main()
