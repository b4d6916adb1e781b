"""The rules of the house: who imports whom, how large and how dense, what is read, who sees labels.

Each rule is a function from sources to violations. It must find none here, and each one that is
planted in a small synthetic house. It reads names and structure, not behaviour.

Run: python scripts/verify/verify_budget.py [METRICS.jsonl …]     (their keys must be defined, too)
"""

import ast
import io
import json
import re
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from vgrout.run.runlog import COLUMNS

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reference" / "metrics.md"
PACKAGE = "src/vgrout/"
ORDER = (  # a unit imports those before it: files and folders at the top of src/vgrout
    "core config files stats arms model grader env gate run organism experiment cli train"
).split()
PROGRAMS = ("train.py", "__main__.py")  # they import from anywhere, and nothing imports them
EDGES = 45  # at most, between units
TOP = 15  # files and folders
DENSEST = 10.0  # tokens a code line
TOKENS = 170_000  # of all files
FUNCTION_LINES = {"train.main": 60, "model.update.update": 45}
LONGEST = 60  # lines of any other function
RUFF = "-m ruff check --output-format=concise".split()
TY = "-m ty check --output-format=concise --ignore=all".split()
TYPES = "unresolved-reference missing-argument unknown-argument too-many-positional-arguments"
FIELDS = 15  # of a section of the config
STREAMED = 14  # columns
PAYLOAD = {f"scripts/verify/{name}.py" for name in ("attacks", "cases")}  # tables of inputs
SEES_LABELS = {"gate/oracle.py", "gate/controls.py", "gate/monitors/labelled.py"}
LABELS = {"correct", "reward_hack", "mechanism", "teacher", "grade", "own_tests_pass"}
COMPUTED = {"eta_minutes"}  # streamed, but not stored
LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
FOREIGN = re.compile(r"torch\.load\(|trust_remote_code\s*=\s*True")
Sources = dict[str, str]  # path from the root → text


@cache
def every_node(text: str) -> list[ast.AST]:
    return [*ast.walk(ast.parse(text))]


def nodes(text: str, *kinds: type) -> Iterator[ast.AST]:
    return (node for node in every_node(text) if isinstance(node, kinds))


def package(sources: Sources) -> Sources:
    return {p.removeprefix(PACKAGE): t for p, t in sources.items() if p.startswith(PACKAGE)}


def imported(text: str) -> set[str]:
    """The vgrout modules that a source imports, without `vgrout.`"""
    names = set()
    for node in nodes(text, ast.Import):
        names |= {alias.name for alias in node.names}
    for node in nodes(text, ast.ImportFrom):
        names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("vgrout.") for name in names if name.startswith("vgrout.")}


def edges(sources: Sources) -> set[tuple[str, str]]:
    """(unit, unit that it imports): units are the files and folders at the top of the package."""
    found = set()
    for path, text in package(sources).items():
        unit = path.partition("/")[0].removesuffix(".py")
        if Path(path).name not in PROGRAMS:
            found |= {(unit, name.partition(".")[0]) for name in imported(text)}
    return {(a, b) for a, b in found if a != b}


def imports(sources: Sources) -> Iterator[str]:
    """No import goes up in the order of units, they are few, and gates alone import train."""
    found = edges(sources)
    if len(found) > EDGES:
        yield f"{len(found)} imports between units, more than {EDGES}"
    for unit, other in sorted(found):
        if not {unit, other} <= {*ORDER}:
            yield f"{unit} imports {other}: not all are in ORDER"
        elif ORDER.index(other) > ORDER.index(unit):
            yield f"{unit} imports {other}, which stands above it"
    for path, text in sources.items():
        names = {name.partition(".")[0] for name in imported(text)}
        if "train" in names and not path.startswith("scripts/verify/"):
            yield f"{path} imports train"


def names(sources: Sources) -> Iterator[str]:
    """Few files and folders stand at the top of the package."""
    units = {path.partition("/")[0] for path in package(sources)}
    if len(units) > TOP:
        yield f"{len(units)} files and folders at the top of src/vgrout, more than {TOP}"


def lint(sources: Sources) -> Iterator[str]:
    """ruff finds nothing: dead names, wide lines, pickles, names of the standard library."""
    for path, text in sources.items():
        command = [sys.executable, *RUFF, f"--stdin-filename={path}", "-"]
        done = subprocess.run(command, input=text, text=True, cwd=ROOT, capture_output=True)
        if done.returncode:
            yield done.stdout.partition("\n")[0] or done.stderr


def types(sources: Sources) -> Iterator[str]:
    """ty finds no name, argument or function's parameter that is not there."""
    found = [f"--error={rule}" for rule in TYPES.split()]
    with tempfile.TemporaryDirectory() as folder:
        for path, text in sources.items():
            Path(folder, path).parent.mkdir(parents=True, exist_ok=True)
            Path(folder, path).write_text(text)
        command = [sys.executable, *TY, *found, "--python", sys.prefix, "."]
        done = subprocess.run(command, text=True, cwd=folder, capture_output=True)
    if done.returncode:
        yield from done.stdout.splitlines()[:-1] or [done.stderr]


def lengths(sources: Sources) -> Iterator[str]:
    """Functions are short: `main` and `update` by limits of their own."""
    for path, text in sources.items():
        module = path.removeprefix(PACKAGE).removesuffix(".py").replace("/", ".")
        for node in nodes(text, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            limit = FUNCTION_LINES.get(f"{module}.{node.name}", LONGEST)
            if lines > limit:
                yield f"{path}: {node.name} has {lines} lines, more than {limit}"


def docstrings(text: str) -> set[int]:
    """The lines of strings that stand alone."""
    lines = set()
    for node in nodes(text, ast.Expr):
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines |= {*range(node.lineno, node.end_lineno + 1)}
    return lines


@cache
def measured(text: str) -> tuple[int, int]:
    """Tokens and lines of code, docstrings and comments aside."""
    aside, tokens, lines = docstrings(text), 0, set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in LAYOUT and token.start[0] not in aside and token.string:
            tokens += 1
            lines |= {*range(token.start[0], token.end[0] + 1)}
    return tokens, len(lines)


def shape(sources: Sources) -> Iterator[str]:
    """Files are not golfed: tokens a code line, and no line that the formatter spares."""
    for path, text in sources.items():
        if path in PAYLOAD:
            continue
        tokens, lines = measured(text)
        if tokens > (DENSEST + 0.05) * lines:  # 10.0, as it is printed
            yield f"{path} has {tokens / lines:.1f} tokens a code line, more than {DENSEST:g}"
        if re.search("# fmt: " + "skip", text):
            yield f"{path} keeps a line from the formatter"


def size(sources: Sources) -> Iterator[str]:
    """The repository stays small: tokens of code."""
    total = sum(measured(text)[0] for path, text in sources.items() if path not in PAYLOAD)
    if total > TOKENS:
        yield f"{total:,} tokens, more than {TOKENS:,}"


def config(sources: Sources) -> Iterator[str]:
    """Each section of the config has few fields, and every field is read."""
    own = package(sources)
    loads = (n for text in own.values() for n in nodes(text, ast.Attribute))
    read = {node.attr for node in loads if isinstance(node.ctx, ast.Load)}
    for node in nodes(own["config.py"], ast.ClassDef):
        if node.name.endswith("Config"):
            fields = [item.target.id for item in node.body if isinstance(item, ast.AnnAssign)]
            if len(fields) > FIELDS:
                yield f"{node.name} has {len(fields)} fields, more than {FIELDS}"
            yield from (f"{node.name}.{f} is never read" for f in fields if f not in read)


def arms(sources: Sources) -> Iterator[str]:
    """The loop knows phases and no arm: it names none, and compares nothing with a name."""
    text = package(sources)["train.py"]
    for node in nodes(text, ast.Attribute, ast.Name):
        name = node.attr if isinstance(node, ast.Attribute) else node.id
        if name in ("arm", "arms", "ARMS", "intervention"):
            yield f"train.py line {node.lineno} names {name}"
    for node in nodes(text, ast.Compare, ast.Match):
        constants = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
        if any(isinstance(value, str) and value != "__main__" for value in constants):
            yield f"train.py line {node.lineno} compares with a name: {ast.unparse(node)}"


def labels(sources: Sources) -> Iterator[str]:
    """What trains the policy names no label, mechanism or teacher flag."""
    for path, text in package(sources).items():
        if path.startswith(("model/", "gate/")) and path not in SEES_LABELS:
            for node in nodes(text, ast.Attribute):
                if node.attr in LABELS:
                    yield f"{path} line {node.lineno} names .{node.attr}"


def foreign_code(sources: Sources) -> Iterator[str]:
    """No code of a model repository is run."""
    for path, text in package(sources).items():
        yield from (f"{path}: {match.group().strip()}" for match in FOREIGN.finditer(text))


def defined_in(text: str) -> list[str]:
    """The keys that a text's table rows define."""
    cells = re.findall(r"^\| ((?:`[^`]+`(?:, )?)+) \|", text, re.M)
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def key_differences(keys: Iterable[str], page: str, complete: bool) -> Iterator[str]:
    """Logged keys and the page's rows agree; `hack_<mode>` there defines hack_sentinel.

    `complete` says that a routeV run logged the keys: it has every key but the monitors'.
    """
    monitors = page.partition("## Live monitors")[2].partition("\n## ")[0]
    of_monitors, defined = (defined_in(text) for text in (monitors, page))
    patterns = {name: re.compile(re.sub(r"<\w+>", r"\\w+", name)) for name in defined}
    for key in sorted(keys):
        if not any(pattern.fullmatch(key) for pattern in patterns.values()):
            yield f"{key} is logged, but not defined"
    for name, pattern in patterns.items():
        if complete and name not in of_monitors and not any(map(pattern.fullmatch, keys)):
            yield f"{name} is defined, but not logged"


# ── a small house in order, and what breaks each rule ────────────────────────────────────────────

CONFIG, TRAIN = "src/vgrout/config.py", "src/vgrout/train.py"
GATE, UPDATE = "src/vgrout/gate/gate.py", "src/vgrout/model/update.py"
GOOD = {
    CONFIG: "class RunConfig:\n    seed: int = 1\n",
    TRAIN: "from vgrout import config\n\nprint(config.seed)\n",
    GATE: "",
}
SKIP = "x = 1  # fmt: " + "skip\n"
BODY = "    x = 1\n"
EVERY = f"from vgrout import {', '.join(ORDER)}\n"
MUTATIONS = {  # rule → (path, text that is added there), each of which it must find fault with
    imports: [
        (GATE, "from vgrout import cli\n"),
        (CONFIG, "from vgrout.gate.gate import x\n"),
        ("src/vgrout/zap.py", "from vgrout import core\n"),
        ("scripts/view/a.py", "from vgrout.train import main\n"),
    ],
    lint: [
        ("src/vgrout/types.py", ""),
        ("scripts/verify/trace.py", ""),
        (GATE, "import pickle\n\nprint(pickle.load(x))\n"),
        ("scripts/a.py", f"{'x' * 97} = 1\n"),
        (GATE, "def f():\n    x = 1\n"),
    ],
    types: [(GATE, "x = never\n"), (GATE, "def f(a): ...\n\n\nf(1, 2)\nf()\nf(a=1, b=2)\n")],
    lengths: [
        (GATE, "def f():\n" + BODY * 60),
        (TRAIN, "def main():\n" + BODY * 60),
        (UPDATE, "def update():\n" + BODY * 45),
    ],
    shape: [
        (GATE, "x = [1, 2, 3, 4, 5, 6]\n"),
        (GATE, SKIP),
    ],
    size: [(GATE, "x = 1\n" * (TOKENS // 3))],
    config: [
        (CONFIG, "    never: int = 0\n"),
        (CONFIG, "    seed: int = 1\n" * FIELDS),
    ],
    arms: [
        (TRAIN, "if run.intervention:\n    pass\n"),
        (TRAIN, "x = 1 if phase.score in ('a', 'b') else 0\n"),
    ],
    labels: [
        (GATE, "score = rollout.grade.reward_hack\n"),
        (UPDATE, "w = row.teacher\n"),
    ],
    foreign_code: [
        (GATE, "load(trust_remote_code=True)\n"),
        (UPDATE, "m = torch.load(path)\n"),
    ],
}


def report(what: str, violations: list[str]) -> int:
    """Print a rule and its violations; returns how many there are."""
    print("BROKEN" if violations else "ok    ", what)
    for line in violations:
        print(" " * 8 + line)
    return len(violations)


def main() -> None:
    files = [path for base in ("src", "scripts") for path in sorted((ROOT / base).rglob("*.py"))]
    sources = {str(path.relative_to(ROOT)): path.read_text() for path in files}
    broken = 0
    assert not edges({TRAIN: EVERY, "src/vgrout/gate/__main__.py": EVERY}), "programs count"
    for rule, mutations in MUTATIONS.items():
        assert not [*rule(GOOD)], f"{rule.__name__} finds fault with a good house"
        for path, text in mutations:
            broken_house = GOOD | {path: GOOD.get(path, "") + text}
            assert [*rule(broken_house)], f"{rule.__name__} misses {text!r} in {path}"
        broken += report(rule.__doc__, [*rule(sources)])
    crowd = {f"src/vgrout/unit_{i}.py": EVERY for i in range(TOP + 1)}
    assert len([*names(crowd)]) == 1, "too many files at the top go unnoticed"
    assert len(edges(crowd)) > EDGES and "more than" in next(imports(crowd)), "or imports"
    page = PAGE.read_text()
    rows = [json.loads(line) for path in sys.argv[1:] for line in open(path)]
    keys = {key for row in rows for key in row}
    keys |= {key for column in COLUMNS for key in column.keys.split()} - COMPUTED
    assert [*key_differences(["surprise"], page, False)], "an undefined key goes unnoticed"
    assert not [*key_differences(["hack_sentinel"], page, False)]
    assert [*key_differences(["step"], page, True)], "a definition in vain goes unnoticed"
    violations = [*key_differences(keys, page, complete=bool(rows))]
    if len(COLUMNS) > STREAMED:
        violations.append(f"{len(COLUMNS)} streamed columns, more than {STREAMED}")
    broken += report(f"{len(keys)} logged keys are those that docs define", violations)
    print(f"{len(edges(sources))} imports between units, at most {EDGES}")
    assert not broken, f"{broken} violations"


if __name__ == "__main__":
    main()
