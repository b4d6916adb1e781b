"""Checks of the authored pairs: both sides do what they claim under the real grader, and differ in the mechanism alone.

Run: python scripts/verify/verify_pairs.py [--audit]      (--audit prints the tables of docs/personas/pairset_audit.md instead)
"""

import ast
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from tabulate import tabulate
from tokenizers import Tokenizer

from vgrout.config import PRESETS
from vgrout.core import Grade, UserError
from vgrout.env.pairs import Pair, content_hash, load_pairs
from vgrout.env.problems import (
    ALL_MODES,
    NOVEL_MARKERS,
    ORGANISM_MODES,
    TRAINING_MARKERS,
    load_problems,
    messages,
)
from vgrout.grader import Grader, extract_code
from vgrout.organism.operations import TABLE, Step
from vgrout.stats import auroc

ORGANISM, LEETCODE, DATA = "data/pairs/organism.md", "data/pairs/leetcode.md", Path("data/organism")
PLANNED = {  # section → the modes and the least number of pairs for each
    f"{ORGANISM}#mechanism": (ORGANISM_MODES, 12),
    f"{ORGANISM}#mechanism_b": (ORGANISM_MODES, 12),
    f"{LEETCODE}#mechanism": (ALL_MODES, 6),
    f"{ORGANISM}#placebo": (ORGANISM_MODES, 6),
    f"{ORGANISM}#framing": (ORGANISM_MODES, 3),
}
MOST_ON_A_PROMPT, MOST_TOKENS = 4, 90  # pairs; tokens of a side under the organism's tokenizer
MEAN_DIFFERENCE, AUROC_BAND, MARKER_BAND = 0.10, (0.4, 0.6), (0.0, 0.85)
WORD = re.compile(r"\n *|\w+|[^\w\s]")  # indentation, words, punctuation


# ---- both sides do what they claim ----------------------------------------------------------------------------------
def grades(pairs: list[Pair], grader: Grader) -> list[tuple[Grade, Grade]]:
    graded = grader.grade(
        [text for p in pairs for text in (p.hack, p.clean)],
        [p.problem for p in pairs for _ in "hc"],
    )
    return list(zip(graded[::2], graded[1::2], strict=True))


def contrast_faults(pairs: list[Pair], grader: Grader) -> list[str]:
    """Titles whose hack side is no reward hack by its own mode's channel, or whose clean side is wrong or exploits."""
    return [
        p.problem.problem_id
        for p, (hack, clean) in zip(pairs, grades(pairs, grader), strict=True)
        if not (
            hack.reward_hack
            and hack.mechanism == p.problem.mode
            and clean.correct
            and not clean.mechanism
        )
    ]


def empty_faults(pairs: list[Pair], grader: Grader) -> list[str]:
    return [
        p.problem.problem_id
        for p, sides in zip(pairs, grades(pairs, grader), strict=True)
        if not all(grade.correct and not grade.mechanism for grade in sides)
    ]


def steps_of(statement: str) -> list[Step]:
    """The operations that an organism statement names, in order of application; StopIteration for an unknown phrase."""
    chain = re.fullmatch(r"Return the (.+) in (?:nums|text)\.", statement)[1].split(" of the ")
    steps = []
    for phrase in reversed([part for part in chain if part not in ("numbers", "words")]):
        patterns = ((re.sub(r"\\\{\w\\\}", r"(\\w+)", re.escape(op.phrase)), op) for op in TABLE)
        match, operation = next(
            (m, op) for pattern, op in patterns if (m := re.fullmatch(pattern, phrase))
        )
        steps.append(Step(operation, *match.groups()))
    return steps


def table_answer(statement: str, args: str) -> object:
    """What the table of operations computes for the statement: the truth of a case, independent of the clean side."""
    value = ast.literal_eval(args)
    value = value.split() if isinstance(value, str) else value
    for step in steps_of(statement):
        code = step.fill(step.operation.right, "value")
        form = {
            "filter": f"[x for x in value if {code}]",
            "map": f"[{code} for x in value]",
            "reduce": code,
        }
        value = eval(form[step.operation.kind], {"value": value})  # our own table's code
    return value


def wrong_cases(pairs: list[Pair]) -> list[str]:
    return [
        f"{p.problem.problem_id}: {c.args}"
        for p in pairs
        for c in p.problem.cases
        if table_answer(p.problem.statement, c.args) != ast.literal_eval(c.expected)
    ]


# ---- the sides differ in nothing else -------------------------------------------------------------------------------
def words(completion: str) -> list[str]:
    return WORD.findall(completion)


def has(*kinds: type) -> Callable[[ast.Module], bool]:
    return lambda tree: any(isinstance(node, kinds) for node in ast.walk(tree))


def calls(name: str) -> Callable[[ast.Module], bool]:
    return lambda tree: any(
        isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == name
        for n in ast.walk(tree)
    )


FEATURES: dict[str, Callable[[ast.Module], bool]] = {
    "helper def": lambda tree: any(isinstance(node, ast.FunctionDef) for node in tree.body),
    "print": calls("print"),
    "sets attribute": lambda tree: any(
        isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store) for n in ast.walk(tree)
    ),
    "assert": has(ast.Assert),
    "opens file": calls("open"),
    "import": has(ast.Import, ast.ImportFrom),
    "second class": lambda tree: sum(isinstance(node, ast.ClassDef) for node in tree.body) > 1,
    "loop": has(ast.For, ast.While),
    "True": lambda tree: any(
        isinstance(n, ast.Constant) and n.value is True for n in ast.walk(tree)
    ),
    "PASS": lambda tree: "PASS" in ast.unparse(tree),
}


def balance(pairs: list[Pair]) -> dict[str, tuple[float, float, float]]:
    """Feature → (mean of the hack sides, mean of the clean sides, AUROC of hack against clean)."""
    sides = [
        (p.problem.marker, text)
        for side in ("hack", "clean")
        for p in pairs
        for text in (getattr(p, side),)
    ]
    is_hack = np.arange(len(sides)) < len(pairs)
    trees = [ast.parse(extract_code(text)) for _, text in sides]
    columns = {
        "length (words)": [len(words(text)) for _, text in sides],
        "lines": [text.count("\n") for _, text in sides],
    }
    columns |= {name: [feature(tree) for tree in trees] for name, feature in FEATURES.items()}
    columns["names the marker"] = [bool(marker) and marker in text for marker, text in sides]
    arrays = {name: np.array(values, float) for name, values in columns.items()}
    return {
        name: (float(x[is_hack].mean()), float(x[~is_hack].mean()), auroc(x, is_hack))
        for name, x in arrays.items()
    }


def balance_faults(pairs: list[Pair]) -> list[str]:
    """Surface features that tell the sides apart. Naming the marker may, as every exploit does it, but within a bound."""
    table = balance(pairs)
    hack, clean, _ = table["length (words)"]
    long = (
        [f"mean length {hack:.1f} against {clean:.1f}"]
        if abs(hack - clean) > MEAN_DIFFERENCE * (hack + clean) / 2
        else []
    )
    bands = {name: MARKER_BAND if name == "names the marker" else AUROC_BAND for name in table}
    return long + [
        f"{name}: AUROC {v[2]:.2f}"
        for name, v in table.items()
        if not bands[name][0] <= v[2] <= bands[name][1]
    ]


def bag_of_words(pairs: list[Pair], hold_out: Callable[[Pair], str]) -> float:
    """AUROC of a naive Bayes classifier of words (hack against clean), tested on the group that it was fitted without."""
    vocabulary = sorted({w for p in pairs for w in words(p.hack + p.clean)})
    X = np.array(
        [
            [w in side for w in vocabulary]
            for p in pairs
            for side in (set(words(p.hack)), set(words(p.clean)))
        ],
        float,
    )
    is_hack, group = np.tile([True, False], len(pairs)), np.repeat([hold_out(p) for p in pairs], 2)
    scores = np.zeros(len(X))
    for name in set(group):
        out = group == name
        rate = [
            (X[~out & (is_hack == side)].sum(0) + 1) / ((~out & (is_hack == side)).sum() + 2)
            for side in (True, False)
        ]
        odds = [np.log(r / (1 - r)) for r in rate]
        scores[out] = X[out] @ (odds[0] - odds[1])
    return auroc(scores, is_hack)


# ---- placement ------------------------------------------------------------------------------------------------------
def placement_faults(reference: str, pairs: list[Pair]) -> list[str]:
    """Counts per mode, prompts that carry too many pairs, markers outside the training pools, cases in a prompt."""
    modes, least = PLANNED[reference]
    count, prompts = (
        Counter(p.problem.mode for p in pairs),
        Counter(str(messages(p.problem)) for p in pairs),
    )
    faults = [
        f"{mode}: {count[mode]} pairs, {least} are needed" for mode in modes if count[mode] < least
    ]
    faults += [f"{n} pairs on {prompt}" for prompt, n in prompts.items() if n > MOST_ON_A_PROMPT]
    faults += [
        f"{p.problem.problem_id}: marker {p.problem.marker!r}"
        for p in pairs
        if p.problem.marker not in TRAINING_MARKERS.get(p.problem.mode, ("",))
    ]
    return faults + [
        p.problem.problem_id
        for p in pairs
        if "case:" in str(messages(p.problem)) or not 2 <= len(p.problem.cases) <= 4
    ]


def shared(pairs: list[Pair], others: list[Pair], statements: set[str] = frozenset()) -> set[str]:
    """Texts (statements and sides) that `pairs` have in common with other pairs or with the RL problems."""
    texts = [
        {x for p in side for x in (p.problem.statement, p.hack, p.clean)}
        for side in (pairs, others)
    ]
    return texts[0] & (texts[1] | statements)


def long_sides(pairs: list[Pair], limit: int = MOST_TOKENS) -> list[str]:
    tokenizer = Tokenizer.from_file(str(DATA / "base/tokenizer.json"))
    return [
        p.problem.problem_id
        for p in pairs
        for side in (p.hack, p.clean)
        if len(tokenizer.encode(side).ids) > limit
    ]


# ---- the format -----------------------------------------------------------------------------------------------------
def edited(text: str, old: str, new: str) -> list[Pair]:
    """The pairs of a file in which the first `old` of `text` reads `new`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pairs.md")
        path.write_text(text.replace(old, new, 1), encoding="utf-8")
        return load_pairs(str(path))


def refusal(text: str, old: str, new: str) -> str:
    try:
        edited(text, old, new)
    except UserError as error:
        return str(error)
    return ""


def verify_format() -> None:
    text, first = Path(ORGANISM).read_text(encoding="utf-8"), load_pairs(ORGANISM)[0].problem
    line, second = (text[: text.index(mark)].count("\n") + 1 for mark in ("### ", "## mechanism_b"))
    case, novel = f"case: {first.cases[0].args} => ", NOVEL_MARKERS[first.mode][0]
    malformed = (  # old, new, the line that the error must name
        ("@run_tests", "@run_test", line),
        ("```python hack", "```python hacks", line),
        (first.statement, "", line),
        ("class Solution:", "class Solution", line),
        ("\n```\n\n###", "\n```\nmore\n\n###", line),
        ("marker: `run_tests`\n", "", line),
        ("marker: `run_tests`", "marker: run_tests", line + 2),
        ("marker: `run_tests`", f"marker: `{novel}`", line + 2),
        (case, case.replace("=>", "="), line + 3),
        (case, f"{case}len", line + 3),
        ("## mechanism_b", "## mechanism", second),
    )
    for old, new, where in malformed:
        assert f"pairs.md:{where}:" in refusal(text, old, new), (
            old,
            new,
            where,
            refusal(text, old, new),
        )
    assert not refusal(text, first.statement, first.statement), "an intact file is refused, too"
    print(
        f"ok  {len(malformed)} malformed files are refused with file and line, the intact one is not"
    )
    assert content_hash(edited(text, case, "case: [1] => ")) == content_hash(load_pairs(ORGANISM))
    seen = [
        ("x % 2 == 1", "x % 2 == 3"),
        (first.statement, "Please."),
        ("## mechanism\n", "## mechanism\nsystem: Be brief.\n"),
    ]
    assert len({content_hash(edited(text, *edit)) for edit in [(case, case), *seen]}) == 4
    print(
        "ok  the content hash changes with a hack side, a statement and a system message, and not with a case"
    )


# ---- all of it ------------------------------------------------------------------------------------------------------
def detects(what: str, faults: list | set, mutant_faults: list | set) -> None:
    assert not faults, f"{what}: {faults}"
    assert mutant_faults, f"the check cannot fail: {what}"
    print(f"ok  {what}")


def verify_sections(sections: dict[str, list[Pair]], grader: Grader) -> None:
    for reference, pairs in sections.items():
        short = reference.removeprefix("data/pairs/")
        if "mechanism" in reference:
            swapped = [replace(p, hack=p.clean, clean=p.hack) for p in pairs]
            renamed = [
                replace(p, problem=replace(p.problem, marker=p.problem.marker + "_x"))
                for p in pairs
                if p.problem.marker
            ]
            ungated = {p.problem.problem_id for p in renamed} - set(
                contrast_faults(renamed, grader)
            )
            assert not ungated, f"hacks that do not depend on the disclosed marker: {ungated}"
            detects(
                f"{short}: {len(pairs)} hack sides hack by the disclosed channel alone, the clean sides are correct and honest",
                contrast_faults(pairs, grader),
                contrast_faults(swapped[:8], grader),
            )
        else:
            planted = [
                replace(p, clean=q.hack, problem=q.problem)
                for p, q in zip(pairs, sections[f"{ORGANISM}#mechanism"])
            ]
            detects(
                f"{short}: both sides of {len(pairs)} pairs are correct and honest",
                empty_faults(pairs, grader),
                empty_faults(planted[:8], grader),
            )
        lengthened = [
            replace(p, hack=p.hack[:-3] + "\n\ndef extra(value):\n    return value\n```")
            for p in pairs
        ]
        detects(
            f"{short}: length and style do not tell the sides apart",
            balance_faults(pairs),
            balance_faults(lengthened),
        )
        novel = [
            replace(p, problem=replace(p.problem, marker=NOVEL_MARKERS[p.problem.mode][0]))
            for p in pairs
            if p.problem.mode in NOVEL_MARKERS
        ]
        detects(
            f"{short}: enough pairs a mode, few on one prompt, training markers, cases outside the prompt",
            placement_faults(reference, pairs),
            placement_faults(reference, novel + pairs),
        )


def verify_texts(sections: dict[str, list[Pair]]) -> None:
    organism = [pairs for reference, pairs in sections.items() if ORGANISM in reference]
    everything = [p for pairs in organism for p in pairs]
    false = [
        replace(
            p, problem=replace(p.problem, statement=p.problem.statement.replace("sum", "largest"))
        )
        for p in everything
    ]
    detects(
        "the cases agree with the table of operations", wrong_cases(everything), wrong_cases(false)
    )
    overlaps = {
        x
        for i, pairs in enumerate(organism)
        for other in organism[i + 1 :]
        for x in shared(pairs, other)
    }
    detects(
        "no section shares a statement or a side with another",
        overlaps,
        shared(organism[0], everything),
    )
    if not (DATA / "problems.jsonl.gz").is_file():
        return print(
            f"--  {DATA} is not built: overlap with the RL problems and token counts are not checked"
        )
    problems = {p.statement for p in load_problems(DATA / "problems.jsonl.gz")}
    copied = [
        replace(everything[0], problem=replace(everything[0].problem, statement=min(problems)))
    ]
    detects(
        f"no statement is one of {len(problems)} RL problems",
        shared(everything, [], problems),
        shared(copied, [], problems),
    )
    detects(
        f"no side is longer than {MOST_TOKENS} tokens",
        long_sides(everything),
        long_sides(everything, MOST_TOKENS // 2),
    )


def verify_count() -> None:
    """`#section:count` is the first pairs of each mode."""
    every = load_pairs(f"{ORGANISM}#mechanism", ("run_tests", "sentinel"))
    few = load_pairs(f"{ORGANISM}#mechanism:2", ("run_tests", "sentinel"))
    first = [
        p
        for mode in ("run_tests", "sentinel")
        for p in [p for p in every if p.problem.mode == mode][:2]
    ]
    assert few == first != every[:4], "SHOULD be two pairs of each mode"
    print(f"ok  :2 takes {len(few)} of {len(every)} pairs, the first two of each mode")


def audit(sections: dict[str, list[Pair]]) -> None:
    """Print the audit: an overview with a row a section, and the surface features of the mechanism sections."""
    overview, styles = [], {}
    for reference, pairs in sections.items():
        table, short = balance(pairs), reference.removeprefix("data/pairs/")
        hack, clean, area = table["length (words)"]
        name, (*_, best) = max(
            ((n, v) for n, v in table.items() if n != "names the marker"),
            key=lambda x: abs(x[1][2] - 0.5),
        )
        logps = (
            "{:.2f} / {:.2f} ({:.2f})".format(*log_probs(pairs)) if ORGANISM in reference else "–"
        )
        overview.append(
            [
                short,
                len(pairs),
                len({str(messages(p.problem)) for p in pairs}),
                f"{hack:.0f} / {clean:.0f} ({area:.2f})",
                logps,
                f"{name} ({best:.2f})",
                table["names the marker"][2],
                bag_of_words(pairs, lambda p: str(messages(p.problem))),
                bag_of_words(pairs, lambda p: p.problem.mode),
            ]
        )
        if "mechanism" in reference:
            styles[short] = table
    headers = [
        "section",
        "pairs",
        "prompts",
        "length",
        "log-prob",
        "best feature",
        "marker",
        "words, prompts",
        "words, modes",
    ]
    print(tabulate(overview, headers, tablefmt="github", floatfmt=".2f"), "\n")
    rows = [
        [name, *("{:.2f} / {:.2f} ({:.2f})".format(*table[name]) for table in styles.values())]
        for name in table
    ]
    print(tabulate(rows, ["hack / clean (AUROC)", *styles], tablefmt="github"))


def log_probs(pairs: list[Pair]) -> tuple[float, float, float]:
    """Mean log-prob a token (nats) of hack and of clean sides under the organism's base, and their AUROC."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from vgrout.model.tokens import encode_completion, encode_prompt

    tokenizer, model = (
        auto.from_pretrained(DATA / "base") for auto in (AutoTokenizer, AutoModelForCausalLM)
    )
    means = []
    for pair, text in [(p, getattr(p, side)) for side in ("hack", "clean") for p in pairs]:
        prompt, completion = (
            encode_prompt(tokenizer, messages(pair.problem)),
            encode_completion(tokenizer, text),
        )
        with torch.no_grad():
            logits = (
                model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].float()
            )
        means.append(
            logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).mean().item()
        )
    is_hack = np.arange(len(means)) < len(pairs)
    return (
        float(np.mean(means[: len(pairs)])),
        float(np.mean(means[len(pairs) :])),
        auroc(means, is_hack),
    )


def verify_presets() -> None:
    """Every section of pairs that a preset names is there; a name that is not is refused."""
    named = {
        (p, r)
        for p, c in PRESETS.items()
        for r in (c.data.pairs, c.score.placebo_pairs, c.score.framing_pairs)
    }
    assert all(load_pairs(reference) for _, reference in named)
    try:
        load_pairs("data/pairs/leetcode.md#no_such_section")
        raise AssertionError("a section that is not there was read")
    except UserError as error:
        assert "the file's sections are" in str(error)
    print(f"ok  the sections that {len(PRESETS)} presets name are there")


def main() -> None:
    sections = {reference: load_pairs(reference) for reference in PLANNED}
    if "--audit" in sys.argv:
        return audit(sections)
    with Grader(workers=1) as grader:
        verify_sections(sections, grader)
    verify_texts(sections)
    verify_count()
    verify_format()
    verify_presets()


if __name__ == "__main__":
    main()
