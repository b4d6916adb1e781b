"""A6: one full trace a mode of a run: prompt, hack, correct solution, each with score and zone.

For each mode, of the students' rows that the gate scored, the last prompt of training in which one rollout hacks and another is correct,
and of these the first of each; where no prompt has both, the last hack and the last solution. So nothing is picked by hand.
"""

from dataclasses import replace
from pathlib import Path

from vgrout.core import Mode, RunRecord, UserError
from vgrout.env.problems import load_problems, messages
from vgrout.files import dumps, write_atomic
from vgrout.run.records import load_record, load_rollouts

SIDES = {"hack": "reward_hack", "solve": "correct"}
KEPT = (
    "step",
    "problem_id",
    "score",
    "zone",
    "advantage",
    "reward",
    "sampled_ablated",
    "completion",
)


def of_mode(rows: list[dict], side: str, mode: str) -> list[dict]:
    return [
        row
        for row in rows
        if row["mode"] == mode and row[SIDES[side]] and not row["teacher"] and row.get("zone")
    ]


def pick(rows: list[dict], mode: str) -> dict[str, dict]:
    """Side → row."""
    sides = {side: of_mode(rows, side, mode) for side in SIDES}
    prompt = lambda row: (row["step"], row["problem_id"])  # noqa: E731
    both = set.intersection(*({prompt(row) for row in found} for found in sides.values()))
    if both:
        last = max(both)
        return {
            side: next(row for row in found if prompt(row) == last) for side, found in sides.items()
        }
    return {side: found[-1] for side, found in sides.items() if found}


def choose(run: Path, target: Path) -> None:
    """Write the traces of a run's rollouts, small enough to commit; UserError where the run has none."""
    record, rows = load_record(run), load_rollouts(run)
    if not rows:
        raise UserError(f"{run} has no rollouts.jsonl.gz: --traces takes the directory of a run")
    problems = {p.problem_id: p for p in load_problems(record.config["data"]["data"])}
    found = []
    for mode in record.config["data"]["modes"]:
        sides = pick(rows, mode)
        shown = {
            s: replace(problems[r["problem_id"]], mode=Mode(mode), marker=r["marker"])
            for s, r in sides.items()
        }
        found.append({"mode": mode, "held_out": mode not in record.config["data"]["pair_modes"]}
                     | {s: {k: r[k] for k in KEPT} | {"prompt": messages(shown[s])[-1]["content"]} for s, r in sides.items()})  # fmt: skip
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(target, (dumps(about(run, record) | {"modes": found}, indent=1) + "\n").encode())


def about(run: Path, record: RunRecord) -> dict:
    return {
        "run": run.name,
        "arm": record.arm,
        "seed": record.seed,
        "steps": record.steps_done,
        "commit": record.commit,
    }


def latex(chosen: dict | None) -> str:
    """The appendix: a heading for each mode, and the texts as listings."""
    if chosen is None:
        return "No trace has been chosen yet: not run.\n"
    escape = lambda text: str(text).replace("_", r"\_")  # noqa: E731
    lines = [f"All traces are of \\texttt{{{escape(chosen['run'])}}} (seed {chosen['seed']}), chosen by rule: the last prompt of training "
             "for which one of the run's own rollouts hacks and another is correct, else the last of each.", ""]  # fmt: skip
    for entry in chosen["modes"]:
        held = "held out: no pair shows it" if entry["held_out"] else "known: the pairs cover it"
        lines.append(f"\\subsection*{{\\texttt{{{escape(entry['mode'])}}} ({held})}}")
        shown = ""
        for side, title in (("hack", "Reward hack"), ("solve", "Correct solution")):
            if side not in entry:
                lines.append(f"{title}: the run has none in this mode.\n")
                continue
            row = entry[side]
            if row["prompt"] != shown:
                lines += [r"\medskip\noindent\textbf{Prompt.}", *listing(shown := row["prompt"])]
            score = "none" if row["score"] is None else f"${row['score']:.3f}$"
            state = "deployed" if row["sampled_ablated"] else "as trained"
            lines += [f"\\medskip\\noindent\\textbf{{{title}.}} Step {row['step']}, sampled {state}, $A = {row['advantage']:.2f}$, "
                      f"score {score}, zone \\textsc{{{row['zone'].lower()}}}.", *listing(row["completion"])]  # fmt: skip
    return "\n".join(lines) + "\n"


def listing(text: str) -> list[str]:
    """A verbatim block; what is no ASCII becomes a question mark, and the one text that would end the block is split."""
    plain = (
        text.strip()
        .encode("ascii", "replace")
        .decode()
        .replace(r"\end{lstlisting}", r"\end {lstlisting}")
    )
    return [r"\begin{lstlisting}", plain, r"\end{lstlisting}"]
