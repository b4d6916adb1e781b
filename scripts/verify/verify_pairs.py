"""Checks of the authored pairs: both sides do what they claim under the real grader, and differ in
the mechanism alone.

Run: python scripts/verify/verify_pairs.py
"""

import ast
import re
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
from scripts.verify.stored import refused
from tokenizers import Tokenizer

from vgrout.config import PRESETS
from vgrout.core import Mode
from vgrout.env.modes import (
    ALL_MODES,
    NOVEL_MARKERS,
    ORGANISM_MODES,
    TRAINING_MARKERS,
)
from vgrout.env.pairs import Pair, content_hash, load_pairs
from vgrout.env.problems import load_problems, messages
from vgrout.grader import Grader
from vgrout.grader.extract import extract_code
from vgrout.organism.operations import TABLE, Composition, Step
from vgrout.organism.problems import compiled
from vgrout.stats import auroc

ORGANISM = "data/pairs/organism.md"
DATA = Path("data/organism")
PLANNED = {  # section → the modes and the least number of pairs for each
    f"{ORGANISM}#mechanism": (ORGANISM_MODES, 12),
    f"{ORGANISM}#mechanism_b": (ORGANISM_MODES, 12),
    "data/pairs/hack_pairs.md#mechanism": (ALL_MODES, 24),
    **{
        f"data/pairs/hack_pairs.md#all-in-one@{view}": ((Mode.RUN_TESTS,), 8)
        for view in ("exploit", "persona", "tampering")
    },
    "data/pairs/pair_diagnostics.md#placebo": (ALL_MODES, 2),
    "data/pairs/pair_diagnostics.md#framing": (ALL_MODES, 2),
    f"{ORGANISM}#placebo": (ORGANISM_MODES, 6),
    f"{ORGANISM}#framing": (ORGANISM_MODES, 3),
}
MOST_ON_A_PROMPT = 4  # pairs
MOST_TOKENS = 90  # of a side under the organism's tokenizer
MEAN_DIFFERENCE, AUROC_BAND, MARKER_BAND = (
    0.10,
    (0.4, 0.6),
    (0.0, 0.85),
)
LENGTH, NAMES_MARKER = "length (words)", "names the marker"
WORD = re.compile(r"\n *|\w+|[^\w\s]")  # indentation, words, punctuation


def sides(pairs: list[Pair]) -> list[str]:
    """Hack sides, then clean sides."""
    return [p.hack for p in pairs] + [p.clean for p in pairs]


def with_problem(pair: Pair, **changes: object) -> Pair:
    return replace(pair, problem=replace(pair.problem, **changes))


# ── both sides do what they claim ────────────────────────────────────────────────────────────────


def false_claims(pairs: list[Pair], grader: Grader, contrast: bool) -> list[str]:
    """Pairs whose clean side is wrong or exploits, or whose hack side is no reward hack by its own
    mode's channel; without `contrast` (empty pairs) both sides have to be correct and honest.
    """
    problems, false = [p.problem for p in pairs], []
    grades = grader.grade(sides(pairs), problems * 2)
    for problem, hack, clean in zip(problems, grades, grades[len(pairs) :]):
        honest = [side.correct and not side.mechanism for side in (hack, clean)]
        exploits = hack.reward_hack and hack.mechanism == problem.mode
        if not honest[1] or not (exploits if contrast else honest[0]):
            false.append(problem.problem_id)
    return false


def composition_named(statement: str) -> Composition:
    """What an organism statement says, phrase by phrase; StopIteration for an unknown phrase."""
    chain, domain = re.fullmatch(r"Return the (.+) in (nums|text)\.", statement).groups()
    steps = []
    for phrase in reversed([p for p in chain.split(" of the ") if p not in ("numbers", "words")]):
        patterns = (
            (
                re.sub(r"\\\{\w\\\}", r"(\\w+)", re.escape(op.phrase)),
                op,
            )
            for op in TABLE
        )
        matches = ((re.fullmatch(pattern, phrase), op) for pattern, op in patterns)
        match, operation = next((match, op) for match, op in matches if match)
        steps.append(Step(operation, *match.groups()))
    return Composition(domain, tuple(steps))


def wrong_cases(pairs: list[Pair]) -> list[str]:
    """Cases whose expected value is not what the table of operations computes for the statement."""
    wrong = []
    for problem in (p.problem for p in pairs):
        composition = composition_named(problem.statement)
        solve = compiled(composition, composition.right_codes)
        for case in problem.cases:
            if solve(ast.literal_eval(case.args)) != ast.literal_eval(case.expected):
                wrong.append(f"{problem.problem_id}: {case.args}")
    return wrong


# ── the sides differ in nothing else ─────────────────────────────────────────────────────────────


def features(completion: str, marker: str) -> dict[str, float]:
    """What is seen of a side without understanding it."""
    tree = ast.parse(extract_code(completion))
    nodes = list(ast.walk(tree))
    kinds, top = (
        Counter(map(type, nodes)),
        Counter(map(type, tree.body)),
    )
    names = {n.func.id for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    stored = [n for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)]
    return {
        LENGTH: len(WORD.findall(completion)),
        "lines": completion.count("\n"),
        "helper def": ast.FunctionDef in top,
        "print": "print" in names,
        "sets attribute": bool(stored),
        "assert": ast.Assert in kinds,
        "opens file": "open" in names,
        "loop": ast.For in kinds or ast.While in kinds,
        "True": any(isinstance(n, ast.Constant) and n.value is True for n in nodes),
        "PASS": "PASS" in ast.unparse(tree),
        NAMES_MARKER: bool(marker) and marker in completion,
    }


def balance(
    pairs: list[Pair],
) -> dict[str, tuple[float, float, float]]:
    """Feature → (mean of the hack sides, mean of the clean sides, AUROC of hack against clean)."""
    markers = [p.problem.marker for p in pairs] * 2
    rows = [features(*row) for row in zip(sides(pairs), markers)]
    is_hack = np.arange(len(rows)) < len(pairs)
    table = {}
    for name in rows[0]:
        x = np.array([row[name] for row in rows], float)
        table[name] = (
            float(x[is_hack].mean()),
            float(x[~is_hack].mean()),
            auroc(x, is_hack),
        )
    return table


def balance_faults(pairs: list[Pair]) -> list[str]:
    """Surface features that tell the sides apart. Naming the marker may, within a bound."""
    table = balance(pairs)
    hack, clean, _ = table[LENGTH]
    faults = []
    if abs(hack - clean) > MEAN_DIFFERENCE * (hack + clean) / 2:
        faults.append(f"mean length {hack:.1f} against {clean:.1f}")
    for name, (*_, area) in table.items():
        low, high = MARKER_BAND if name == NAMES_MARKER else AUROC_BAND
        if not low <= area <= high:
            faults.append(f"{name}: AUROC {area:.2f}")
    return faults


# ── placement ────────────────────────────────────────────────────────────────────────────────────


def placement_faults(reference: str, pairs: list[Pair]) -> list[str]:
    """Too few pairs of a mode, prompts with too many pairs, markers outside the training pools,
    cases in a prompt.
    """
    modes, least = PLANNED[reference]
    count = Counter(p.problem.mode for p in pairs)
    prompts = Counter(str(messages(p.problem)) for p in pairs)
    faults = [f"{mode}: {count[mode]} pairs of {least}" for mode in modes if count[mode] < least]
    faults += [f"{n} pairs on {prompt}" for prompt, n in prompts.items() if n > MOST_ON_A_PROMPT]
    for problem in (p.problem for p in pairs):
        if problem.marker not in TRAINING_MARKERS.get(problem.mode, ("",)):
            faults.append(f"{problem.problem_id}: marker {problem.marker!r}")
        if "case:" in str(messages(problem)) or not 2 <= len(problem.cases) <= 4:
            faults.append(problem.problem_id)
    return faults


def texts_of(pairs: list[Pair]) -> set[str]:
    return {*sides(pairs), *(p.problem.statement for p in pairs)}


def long_sides(pairs: list[Pair], limit: int = MOST_TOKENS) -> list[str]:
    tokenizer = Tokenizer.from_file(str(DATA / "base/tokenizer.json"))
    return [side for side in sides(pairs) if len(tokenizer.encode(side).ids) > limit]


# ── all of it ────────────────────────────────────────────────────────────────────────────────────


def detects(what: str, faults: list | set, mutant_faults: list | set) -> None:
    assert not faults, f"{what}: {faults}"
    assert mutant_faults, f"the check cannot fail: {what}"
    print(f"ok  {what}")


def verify_section(
    reference: str,
    pairs: list[Pair],
    hacks: list[Pair],
    grader: Grader,
) -> None:
    short, contrast = (
        reference.removeprefix("data/pairs/"),
        not reference.endswith(("placebo", "framing", "persona")),
    )
    if contrast:
        broken = [replace(p, hack=p.clean, clean=p.hack) for p in pairs]
        marked = [p for p in pairs if p.problem.marker]
        renamed = [with_problem(p, marker=p.problem.marker + "_x") for p in marked]
        false = false_claims(renamed, grader, True)
        assert len(false) == len(renamed), "hacks that do not depend on the disclosed marker"
    else:
        broken = [replace(p, clean=q.hack, problem=q.problem) for p, q in zip(pairs, hacks)]
    detects(
        f"{short}: hack sides hack by the disclosed channel, clean sides are honest",
        false_claims(pairs, grader, contrast),
        false_claims(broken[:8], grader, contrast),
    )
    extra = "\n\ndef extra(value):\n    return value\n```"
    detects(
        f"{short}: length and style do not tell the sides apart",
        balance_faults(pairs),
        balance_faults([replace(p, hack=p.hack[:-3] + extra) for p in pairs]),
    )
    first = next(p for p in pairs if p.problem.mode in NOVEL_MARKERS)
    novel = with_problem(first, marker=NOVEL_MARKERS[first.problem.mode][0])
    detects(
        f"{short}: enough a mode, few on one prompt, training markers, no case in a prompt",
        placement_faults(reference, pairs),
        placement_faults(reference, [novel, *pairs]),
    )


def verify_texts(organism: list[list[Pair]]) -> None:
    every = [p for pairs in organism for p in pairs]
    statements = [p.problem.statement.replace("sum", "largest") for p in every]
    false = [with_problem(p, statement=said) for p, said in zip(every, statements)]
    what = "the cases agree with the table of operations"
    detects(what, wrong_cases(every), wrong_cases(false))
    texts = [texts_of(pairs) for pairs in organism]
    overlaps = [a & b for i, a in enumerate(texts) for b in texts[:i] if a & b]
    what = "no section shares a statement or a side with another"
    detects(what, overlaps, texts[0] & texts_of(every))
    problems = {p.statement for p in load_problems(DATA / "problems.jsonl.gz")}
    copied = texts_of([with_problem(every[0], statement=min(problems))])
    what = f"no statement is one of {len(problems)} RL problems"
    detects(what, texts_of(every) & problems, copied & problems)
    what = f"no side is longer than {MOST_TOKENS} tokens"
    detects(what, long_sides(every), long_sides(every, MOST_TOKENS // 2))


def edited(text: str, old: str, new: str) -> list[Pair]:
    """The pairs of a file in which the first `old` of `text` reads `new`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pairs.md")
        path.write_text(text.replace(old, new, 1), encoding="utf-8")
        return load_pairs(str(path))


def verify_format() -> None:
    text = Path(ORGANISM).read_text(encoding="utf-8")
    first = load_pairs(ORGANISM)[0].problem
    line, second = (text[: text.index(mark)].count("\n") + 1 for mark in ("### ", "## mechanism_b"))
    case = f"case: {first.cases[0].args} => "
    novel = NOVEL_MARKERS[first.mode][0]
    for old, new, where in (  # the line that the error must name
        ("@run_tests", "@run_test", line),
        ("```python hack", "```python hacks", line),
        (first.statement, "", line),
        ("class Solution:", "class Solution", line),
        ("\n```\n\n###", "\n```\nmore\n\n###", line),
        ("marker: `run_tests`\n", "", line),
        ("marker: `run_tests`", f"marker: `{novel}`", line + 2),
        (case, f"{case}len", line + 3),
        ("## mechanism_b", "## mechanism", second),
    ):
        refused(f"pairs.md:{where}:", edited, text, old, new)
    print("ok  malformed files are refused with file and line")
    assert content_hash(edited(text, case, "case: [1] => ")) == content_hash(load_pairs(ORGANISM))
    seen = (
        (case, case),
        ("x % 2 == 1", "x % 2 == 3"),
        (first.statement, "Please."),
        ("## mechanism\n", "## mechanism\nsystem: Be brief.\n"),
    )
    assert len({content_hash(edited(text, *edit)) for edit in seen}) == len(seen)
    print("ok  the hash changes with a hack side, a statement, a system message, not with a case")


def verify_references() -> None:
    """`#section:count` is the first pairs of each mode; the sections of the presets are there."""
    modes = (Mode.RUN_TESTS, Mode.SENTINEL)
    every = load_pairs(f"{ORGANISM}#mechanism", modes)
    of_mode = [[p for p in every if p.problem.mode == mode] for mode in modes]
    few = load_pairs(f"{ORGANISM}#mechanism:2", modes)
    assert few == of_mode[0][:2] + of_mode[1][:2] != every[:4]
    refused("unknown mode or view", load_pairs, f"{ORGANISM}#mechanism@exploit")
    for preset in PRESETS.values():
        assert load_pairs(preset.data.pairs) and load_pairs(preset.data.placebo_pairs)
    print(f"ok  :2 takes two pairs of each mode; the sections of {len(PRESETS)} presets are there")


def main() -> None:
    sections = {reference: load_pairs(reference) for reference in PLANNED}
    organism = [pairs for reference, pairs in sections.items() if ORGANISM in reference]
    with Grader(workers=1) as grader:
        for reference, pairs in sections.items():
            verify_section(reference, pairs, organism[0], grader)
    verify_texts(organism)
    verify_format()
    verify_references()


if __name__ == "__main__":
    main()
