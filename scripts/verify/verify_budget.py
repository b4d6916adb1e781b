"""Checks of the code's shape: sizes, one owner of Config, no branch on an arm, no label in a gate, no unread option.

Each rule is a function from sources to violations. It must find none in src/vgrout, and it must find the one that is
planted in a synthetic source. It reads names and structure, not behaviour.

Run: python scripts/verify/verify_budget.py [METRICS.jsonl …]     (the rows' keys must be defined in docs/metrics.md, too)
"""

import ast
import json
import re
import sys
from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from vgrout.run.runlog import COLUMNS

ROOT = Path(__file__).resolve().parents[2]
Sources = dict[str, str]  # module name → text

TRAIN_LINES, FILE_LINES, FUNCTION_LINES, CONFIG_FIELDS, STREAMED = 350, 300, 60, 15, 14
LABEL_FREE = (
    "gate",
    "direction",
    "lora2r",
    "products",
    "packing",
    "grpo",
    "tokens",
    "tensors",
    "policy",
)
LABELS = {"correct", "reward_hack", "mechanism", "teacher", "grade", "own_tests_pass"}
SEPARATOR = "\n        "
COMPUTED = {"eta_minutes"}  # streamed, but not stored


def sizes(sources: Sources) -> list[str]:
    """train.py, every other file, and every function but a main stay within their number of lines."""
    found = []
    for name, text in sources.items():
        limit = TRAIN_LINES if name == "train" else FILE_LINES
        if (lines := text.count("\n")) > limit:
            found.append(f"{name}.py has {lines} lines, more than {limit}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.name != "main":
                if (length := node.end_lineno - node.lineno + 1) > FUNCTION_LINES:
                    found.append(
                        f"{name}.{node.name} has {length} lines, more than {FUNCTION_LINES}"
                    )
    return found


def config_fields(sources: Sources) -> list[str]:
    """Each config dataclass has at most 15 fields, and every one of them is read."""
    read = {
        n.attr
        for text in sources.values()
        for n in ast.walk(ast.parse(text))
        if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)
    }
    found = []
    for node in ast.walk(ast.parse(sources["config"])):
        if isinstance(node, ast.ClassDef) and (node.name.endswith("Config") or node.name == "Arm"):
            names = [item.target.id for item in node.body if isinstance(item, ast.AnnAssign)]
            if len(names) > CONFIG_FIELDS:
                found.append(f"{node.name} has {len(names)} fields, more than {CONFIG_FIELDS}")
            found += [f"{node.name}.{name} is never read" for name in names if name not in read]
    return found


def arm_branches(sources: Sources) -> list[str]:
    """The loop compares no arm: an arm is a row of ARMS."""
    found = []
    for node in ast.walk(ast.parse(sources["train"])):
        if isinstance(node, ast.Compare):
            for part in (node.left, *node.comparators):
                name = part.id if isinstance(part, ast.Name) else getattr(part, "attr", "")
                if name in ("arm", "intervention", "arm_name"):
                    found.append(
                        f"train.py line {node.lineno} compares the arm: {ast.unparse(node)}"
                    )
    return found


def labels(sources: Sources) -> list[str]:
    """What trains the policy never names a label, a mode's mechanism or a teacher flag."""
    found = []
    for name in LABEL_FREE:
        for node in ast.walk(ast.parse(sources.get(name, ""))):
            if isinstance(node, ast.Attribute) and node.attr in LABELS:
                found.append(f"{name}.py line {node.lineno} names .{node.attr}")
    return found


def imports(text: str) -> set[str]:
    """Return the vgrout modules that a source imports."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module == "vgrout":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vgrout."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.split(".")[1] for alias in node.names if alias.name.startswith("vgrout.")
            }
    return found


def import_graph(sources: Sources) -> list[str]:
    """Imports form a directed graph; nothing imports train.py, and train.py and its command line alone import the Config."""
    graph = {name: imports(text) & sources.keys() for name, text in sources.items()}
    found = [f"{name}.py imports train.py" for name, needs in graph.items() if "train" in needs]
    readers = ("train", "cli", "repeat")
    found += [
        f"{name}.py imports config.py"
        for name, needs in graph.items()
        if "config" in needs and name not in readers
    ]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"import cycle: {' → '.join(error.args[1])}")
    return found


def foreign_code(sources: Sources) -> list[str]:
    """No file is unpickled, and no code of a model repository is run."""
    pattern = re.compile(
        r"^\s*(import pickle|from pickle)|torch\.load\(|trust_remote_code\s*=\s*True", re.M
    )
    return [
        f"{name}.py: {match.group(0).strip()}"
        for name, text in sources.items()
        for match in pattern.finditer(text)
    ]


def defined(document: str) -> list[str]:
    """The keys that the table rows of a text define."""
    cells = re.findall(r"^\| ((?:`[^`]+`(?:, )?)+) \|", document, re.M)
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def key_differences(keys: Iterable[str], document: str, complete: bool) -> list[str]:
    """Logged keys and the table rows of docs/metrics.md agree; `hack_<mode>` there defines hack_sentinel.

    `complete` says that the keys are those of a routeV run, which logs every key but the monitors': then none may be defined in vain.
    """
    patterns = {name: re.compile(re.sub(r"<\w+>", r"\\w+", name)) for name in defined(document)}
    keys, monitors = (
        sorted(set(keys)),
        defined(document.partition("## Live monitors")[2].partition("\n## ")[0]),
    )
    found = [
        f"{key} is logged, but not defined"
        for key in keys
        if not any(p.fullmatch(key) for p in patterns.values())
    ]
    in_vain = [
        name
        for name, pattern in patterns.items()
        if name not in monitors and not any(map(pattern.fullmatch, keys))
    ]
    return found + [f"{name} is defined, but not logged" for name in in_vain if complete]


def long_function(lines: int) -> str:
    return "def f():\n" + "    x = 1\n" * (lines - 1)


GOOD = {
    "config": "class RunConfig:\n    seed: int = 1\n",
    "train": "import vgrout.config\nprint(config.seed)\n",
    "gate": "",
}
RULES = {  # rule → a mutation that it must find
    sizes: [{"train": "x = 1\n" * 351}, {"gate": "x = 1\n" * 301}, {"gate": long_function(61)}],
    config_fields: [
        {"config": GOOD["config"] + "    never: int = 0\n"},
        {"config": "class RunConfig:\n" + "    seed: int = 1\n" * 16},
    ],
    arm_branches: [
        {"train": GOOD["train"] + "if run.intervention == 'routeV':\n    pass\n"},
        {"train": GOOD["train"] + "x = 1 if arm in ('a', 'b') else 0\n"},
    ],
    labels: [{"gate": "score = rollout.grade.reward_hack\n"}, {"grpo": "w = row.teacher\n"}],
    import_graph: [
        {"gate": "from vgrout.config import Config\n"},
        {"gate": "from vgrout import train\n"},
        {"a": "import vgrout.b\n", "b": "from vgrout.a import x\n"},
    ],
    foreign_code: [{"gate": "import pickle\n"}, {"gate": "m = torch.load(path)\n"}],
}


def main() -> None:
    sources = {
        path.stem: path.read_text() for path in sorted((ROOT / "src" / "vgrout").glob("*.py"))
    }
    document = (ROOT / "docs" / "metrics.md").read_text()
    rows = [json.loads(line) for path in sys.argv[1:] for line in open(path)]
    keys = {key for row in rows for key in row} | {
        key for column in COLUMNS for key in column.keys
    } - COMPUTED
    failures = []
    for rule, mutations in RULES.items():
        assert not rule(GOOD), f"{rule.__name__} finds fault with a good source: {rule(GOOD)}"
        assert all(rule(GOOD | mutation) for mutation in mutations), (
            f"{rule.__name__} misses a planted violation"
        )
        found = rule(sources)
        failures += found
        print(f"{'BROKEN' if found else 'ok':6}  {rule.__doc__}", *found, sep=SEPARATOR)
    assert key_differences(["surprise"], document, False) and not key_differences(
        ["hack_sentinel"], document, False
    )
    assert key_differences(["step"], document, True)
    found = key_differences(keys, document, complete=bool(rows))
    found += [f"{len(COLUMNS)} streamed columns, more than {STREAMED}"] * (len(COLUMNS) > STREAMED)
    print(
        f"{'BROKEN' if found else 'ok':6}  {len(keys)} logged keys and docs/metrics.md agree",
        *found,
        sep=SEPARATOR,
    )
    assert not failures + found, f"{len(failures + found)} violations"


if __name__ == "__main__":
    main()
