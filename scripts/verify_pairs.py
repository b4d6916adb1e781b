"""Checks of the authored pairs: both sides do what they claim under the real grader, and differ in the mechanism alone.

Run: python scripts/verify_pairs.py            (--audit prints the tables of docs/personas/pairs.md)
"""

import ast
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vgrout.grader import extract_code
from vgrout.metrics import auroc
from vgrout.pairs import Pair
from vgrout.problems import ALL_MODES, ORGANISM_MODES

PAIRS, PROBLEMS = Path("data/pairs"), Path("data/organism/problems.jsonl.gz")
ORGANISM, LEETCODE = f"{PAIRS}/organism.md", f"{PAIRS}/leetcode.md"
MECHANISM = {  # section → (modes, least number of pairs a mode, most pairs on one prompt)
    f"{ORGANISM}#mechanism": (ORGANISM_MODES, 12),
    f"{ORGANISM}#mechanism_b": (ORGANISM_MODES, 12),
    f"{LEETCODE}#mechanism": (ALL_MODES, 6),
}
HONEST = {f"{ORGANISM}#placebo": (ORGANISM_MODES, 6), f"{ORGANISM}#framing": (ORGANISM_MODES, 3)}
MOST_ON_A_PROMPT, MOST_TOKENS, MEAN_DIFFERENCE, AUROC_BAND = 4, 90, 0.10, (0.4, 0.6)
TOKEN = re.compile(r"\n *|\w+|[^\w\s]")  # about the organism's tokens: indentation, words, punctuation


# ---- surface features -----------------------------------------------------------------------------------------------
def length(completion: str) -> int:
    return len(TOKEN.findall(completion))


def has(*kinds: type) -> Callable[[ast.Module], bool]:
    return lambda tree: any(isinstance(node, kinds) for node in ast.walk(tree))


def calls(name: str) -> Callable[[ast.Module], bool]:
    return lambda tree: any(isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == name for n in ast.walk(tree))


def sets_attribute(tree: ast.Module) -> bool:
    return any(isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store) for n in ast.walk(tree))


def has_helper(tree: ast.Module) -> bool:
    """A function outside of Solution."""
    return any(isinstance(node, ast.FunctionDef) for node in tree.body)


FEATURES: dict[str, Callable[[ast.Module], bool]] = {
    "helper def": has_helper,
    "print": calls("print"),
    "attribute": sets_attribute,
    "assert": has(ast.Assert),
    "open": calls("open"),
    "import": has(ast.Import, ast.ImportFrom),
    "second class": lambda tree: sum(isinstance(node, ast.ClassDef) for node in tree.body) > 1,
    "True": lambda tree: any(isinstance(n, ast.Constant) and n.value is True for n in ast.walk(tree)),
    "PASS": lambda tree: "PASS" in ast.unparse(tree),
    "loop": has(ast.For, ast.While),
}


def balance(pairs: list[Pair]) -> dict[str, tuple[float, float, float]]:
    """Feature → (mean of the hack sides, of the clean sides, AUROC of hack against clean); lengths in token-ish units."""
    sides = [(p, text) for side in ("hack", "clean") for p in pairs for text in (getattr(p, side),)]
    positive = np.arange(len(sides)) < len(pairs)
    trees = [ast.parse(extract_code(text)) for _, text in sides]
    columns = {"length": [length(text) for _, text in sides], "lines": [text.count("\n") for _, text in sides]}
    columns |= {name: [float(feature(tree)) for tree in trees] for name, feature in FEATURES.items()}
    columns["marker named"] = [float(bool(p.problem.marker) and p.problem.marker in text) for p, text in sides]
    return {name: (float(np.mean(np.array(v)[positive])), float(np.mean(np.array(v)[~positive])), auroc(v, positive))
            for name, v in columns.items()}


def balance_faults(pairs: list[Pair]) -> list[str]:
    """What breaks the balance of length; the features of style are reported, and bounded too."""
    table = balance(pairs)
    hack, clean, area = table["length"]
    faults = []
    if abs(hack - clean) > MEAN_DIFFERENCE * (hack + clean) / 2:
        faults.append(f"mean length {hack:.1f} of the hack sides against {clean:.1f}")
    for name, (_, _, area) in table.items():
        if not AUROC_BAND[0] <= area <= AUROC_BAND[1] and name not in UNBOUNDED:
            faults.append(f"{name!r} separates the sides with AUROC {area:.2f}")
    return faults


UNBOUNDED = {"marker named"}  # a hack must name the marker, a clean side may (reported, and below 0.85 over a section)
