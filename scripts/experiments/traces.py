"""A6: one full trace a mode of a run: prompt, hack, correct solution, each with score and zone.

Of the students' rows that the gate scored, by mode: the last prompt of training in which a rollout
hacks and another is correct, and of these the first of each; where no prompt has both, the last
hack and the last solution. So nothing is picked by hand.
"""

from dataclasses import replace
from pathlib import Path

from vgrout.core import Mode, UserError
from vgrout.env.problems import load_problems, messages
from vgrout.files import dumps, write_atomic
from vgrout.run.records import load_record, load_rollouts

SIDES = {"hack": "reward_hack", "solve": "correct"}
KEPT = ("step", "problem_id", "score", "zone", "advantage", "reward", "sampled_ablated")


def pick(rows: list[dict], mode: str) -> dict[str, dict]:
    """Side → row."""
    scored = [row for row in rows if row["mode"] == mode and row.get("zone") and not row["teacher"]]
    by_side = {side: [row for row in scored if row[flag]] for side, flag in SIDES.items()}
    prompts = [{(row["step"], row["problem_id"]) for row in found} for found in by_side.values()]
    if both := set.intersection(*prompts):
        last = max(both)
        by_side = {
            side: [row for row in found if (row["step"], row["problem_id"]) == last][:1]
            for side, found in by_side.items()
        }
    return {side: found[-1] for side, found in by_side.items() if found}


def choose(run: Path, target: Path) -> None:
    """Write the traces of a run's rollouts, small enough to commit; UserError where it has none."""
    record, rows = load_record(run), load_rollouts(run)
    if not rows:
        raise UserError(f"{run} has no rollouts.jsonl.gz: --traces takes the directory of a run")
    data = record.config["data"]
    problems = {problem.problem_id: problem for problem in load_problems(data["data"])}
    found = []
    for mode in data["modes"]:
        entry: dict = {"mode": mode, "held_out": mode not in data["pair_modes"]}
        for side, row in pick(rows, mode).items():
            problem = problems[row["problem_id"]]
            shown = replace(problem, mode=Mode(mode), marker=row["marker"])
            entry[side] = {key: row[key] for key in (*KEPT, "completion")}
            entry[side]["prompt"] = messages(shown)[-1]["content"]
        found.append(entry)
    about = {"run": run.name, "arm": record.arm, "seed": record.seed, "modes": found}
    about |= {"steps": record.steps_done, "commit": record.commit}
    write_atomic(target, (dumps(about, indent=1) + "\n").encode())


def latex(chosen: dict) -> str:
    """The appendix: a heading for each mode, and the texts as listings."""
    run = chosen["run"].replace("_", r"\_")
    lines = [
        f"All traces are of \\texttt{{{run}}} (seed {chosen['seed']}), chosen by rule: the last "
        "prompt of training for which one of the run's own rollouts hacks and another is correct, "
        "else the last of each.\n"
    ]
    for entry in chosen["modes"]:
        mode = entry["mode"].replace("_", r"\_")
        pairs = "no pair shows it" if entry["held_out"] else "pairs show it"
        lines.append(f"\\subsection*{{\\texttt{{{mode}}} ({pairs})}}")
        shown = ""
        for side in SIDES:
            if side not in entry:
                lines.append(f"The run has no {side} in this mode.\n")
                continue
            row = entry[side]
            if row["prompt"] != shown:
                shown = row["prompt"]
                lines += [r"\medskip\noindent\textbf{Prompt.}", listing(shown)]
            score = "none" if row["score"] is None else f"${row['score']:.3f}$"
            state = "deployed" if row["sampled_ablated"] else "as trained"
            lines.append(
                f"\\medskip\\noindent\\textbf{{{side}.}} Step {row['step']}, sampled {state}, "
                f"$A = {row['advantage']:.2f}$, score {score}, zone "
                f"\\textsc{{{row['zone'].lower()}}}."
            )
            lines.append(listing(row["completion"]))
    return "\n".join(lines) + "\n"


def listing(text: str) -> str:
    """A verbatim block; what is no ASCII becomes a question mark."""
    plain = text.strip().encode("ascii", "replace").decode()
    plain = plain.replace(r"\end{lstlisting}", r"\end {lstlisting}")  # would end the block
    return f"\\begin{{lstlisting}}\n{plain}\n\\end{{lstlisting}}"
