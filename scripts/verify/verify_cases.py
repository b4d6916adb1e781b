"""Inputs that people bring: every row of these tables is answered as it says, none by a traceback.

A row of a file is kept, left out and counted, or refused in one line with file and line. A
completion yields the code that was meant. Every rule is switched off once: some row then fails.
"""

import gzip
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock, patch

import torch
from loguru import logger
from transformers import AutoTokenizer, GenerationConfig

from vgrout import files
from vgrout.core import UserError
from vgrout.env import demos, problems
from vgrout.env.demos import TeacherPool
from vgrout.env.problems import check_tests, load_problems
from vgrout.files import read_json_lines
from vgrout.gate.monitors import labelled
from vgrout.grader import Grader, extract
from vgrout.model import loading, tokens
from vgrout.run import records

DEEP, DIGITS = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "7" * 5_000
OWN = {
    "problem_id": "a",
    "split": "train",
    "statement": "Add them.",
    "entry_point": "f",
    "operations": [],
    "canonical": "class Solution: ...",
    "cases": [["[1, 2]", "3"]],
}
LEETCODE = {
    "question_id": "b",
    "query": "Add them.",
    "prompt": "k = 1",
    "completion": "class Solution: ...",
    "entry_point": "Solution().f",
    "test": "assert Solution().f([1, 2]) == 3",
}
DEMO = {"problem_id": "a", "mode": "sentinel", "completion": "1234"}
ROLLOUT = {"problem_id": "x", "completion": "1234", "prompt": "Add.", "reward_hack": True}
ROLLOUTS = [ROLLOUT, ROLLOUT | {"reward_hack": False}] * 12
LONG, HALF, BIG = {"completion": "12345"}, {"completion": "\ud83d"}, f'{{"a": {DIGITS}}}'
TWO = gzip.compress(b'{"a": 1}\n{"a": 2}\n')


def case(args: str, expected: str) -> dict:
    return OWN | {"cases": [[args, expected]]}


def fits(text: str) -> bool:
    return len(text) <= 4


def pool(path: Path) -> list[str]:
    demonstrations = TeacherPool(str(path), (), 1, 1)
    demonstrations.leave_out_long(fits)
    return [text for texts in demonstrations.rows.values() for text in texts]


def probe(path: Path) -> list:
    return labelled.load_labelled(str(path), [], 40, fits)


def run_tests(path: Path) -> list:
    found = load_problems(path)
    check_tests(path, found, GRADER)
    return found


def lines(path: Path) -> list:
    return list(read_json_lines(path))


def absent(path: Path) -> list:
    return load_problems("no-such-file.jsonl")


def partial(path: Path) -> list:
    return list(read_json_lines(path, partial=True))


# reader, rows before the one in question, answer, rows in question; text is a test of LEETCODE
LEFT_OUT = "1 rows, .*1 of 2 rows left out"
FILES: tuple[tuple[Callable, list, str, list], ...] = (
    (lines, [], "2 rows", [b"\xef\xbb\xbf{}\n\n \r\n{}", TWO, TWO + b"\0\0"]),
    (absent, [], ".*download-data", [{}]),
    (lines, [], "line 1: .*cut short", [TWO[:-9], TWO[:20]]),
    (lines, [], "line 1: .*unpacks to more than", [gzip.compress(bytes(1 << 22))]),
    (lines, [], "line 1: not readable", [TWO[:12] + b"!" + TWO[13:], b"{", DEEP.encode()]),
    (partial, [], "2 rows", [TWO + TWO[:-9], b'{}\n{}\n{"a"']),
    (lines, [{}], "2 rows", ['{"a": "\\ud83d\\ude00 \u2028", "b": NaN}'.encode()]),
    (lines, [{}], "line 2: .*", [b"\xff", b"[]", b"null", {"\udc00": 1}, BIG.encode()]),
    (pool, [DEMO], "line 2: .*", [DEMO | HALF, DEEP.encode(), BIG.encode(), b"\xff"]),
    (pool, [DEMO], LEFT_OUT, [DEMO | LONG]),
    (pool, [], "every demonstration is longer", [DEMO | LONG]),
    (probe, ROLLOUTS, "line 25: .*", [ROLLOUT | HALF, DEEP.encode(), BIG.encode(), b"\xff"]),
    (probe, ROLLOUTS, "24 rows, .*1 of 25 rows left out", [ROLLOUT | LONG]),
    (load_problems, [OWN], "line 2: .*surrogates", [LEETCODE | {"query": "\udc00"}]),
    (load_problems, [LEETCODE], "line 2: .*surrogates", [OWN | {"problem_id": "\ud83d"}]),
    (
        load_problems,
        [OWN],
        "2 rows",
        [
            "assert Solution().f(*[1], k = 2) == 1, 'why'",
            "def check(c):\n    assert c(**{'n': [1]}) == [-inf, {1: ()}]",
            "def t(c):\n    assert is_same_list(c(1), list_node([1]))",
        ],
    ),
    (
        load_problems,
        [OWN],
        LEFT_OUT + ".*line 2: ",
        [
            "assert sorted(f([2])) == [2]",
            "assert round(f(2), 5) == 0.5",
            "assert f([2]).copy() == [2]",
            "assert f(1)(2) == 3",
            "assert Solution(1).f(2) == 3",
            "assert Solution().g(2) == 3",
            "assert f(2) is True",
            "assert f(2) == 2j",
            "assert f(2) == -'a'",
            "assert f(2) == {**{}}",
            "assert is_same_list(f(1), sorted([1]))",
            "assert is_same_tree(f(1), tree_node(1))",
            f"assert f(2) == {DIGITS}",
        ],
    ),
    (
        load_problems,
        [LEETCODE],
        LEFT_OUT + ".*line 2: ",
        [case("[1]", "{[1]}"), case("[1]", DIGITS), case("[1]", "..."), case("[1]", "f(1)")],
    ),
    (
        load_problems,
        [LEETCODE],
        "line 2: malformed field",
        [
            case("[1, 2", "3"),
            case("1), (2", "3"),
            case("(yield)", "3"),
            case("n = 1, n = 2", "3"),
            case("1", ""),
            OWN | {"entry_point": "f("},
            OWN | {"split": "dev"},
        ],
    ),
    (
        load_problems,
        [OWN],
        "line 2: malformed field",
        [
            LEETCODE | {"prompt": "import ("},
            LEETCODE | {"prompt": 3},
            LEETCODE | {"completion": ""},
            LEETCODE | {"meta": {}},
            "assert f( == 1",
        ],
    ),
    (load_problems, [OWN], "line 2: the fields match no known schema", [{"question": "?"}]),
    (load_problems, [OWN], r"line 2: duplicate problem id 'a' \(first on line 1\)", [OWN]),
    (load_problems, [], "no usable problem", ["# none", "assert f(1)"]),
    (run_tests, [OWN], "2 rows", ["assert f(k) == 3"]),
    (run_tests, [OWN], "line 2: the arguments of a test", ["assert f(a) == 3"]),
    (run_tests, [OWN], "line 2: .*absent", [LEETCODE | {"prompt": "import absent"}]),
)
NEVER, GOOD = "(?!)", "class Solution:\n    def solve(self, nums):\n        return sum(nums)\n"
DRAFT = GOOD.replace("sum(nums)", "0")
BLOCK, FIRST = f"```python\n{GOOD}```\n", f"```python\n{DRAFT}```\n"
DOC = GOOD.replace(
    "nums):\n", 'nums):\n        """Add.\n\n```python\nsolve([1])\n```\n        """\n'
)
TEXT = GOOD + "x = '''\n```\n'''\n"
ITEM = "".join(f"   {line}\n" for line in BLOCK.splitlines())
QUOTED = "".join(f"> {line}\n" for line in BLOCK.splitlines())
EXAMPLE = "```python\nprint(Solution().solve([1]))  # def solve\n```"
COMPLETIONS = {  # code → texts that hold it
    GOOD: [
        FIRST + BLOCK,
        f"1. The code:\n\n{ITEM}2. Done.",
        f"-  {ITEM.lstrip()}",
        f"So:\n{QUOTED}",
        f"``` Python3\n{GOOD}```",
        f'```python title="a.py"\n{GOOD}```',
        f"```{{.python .numberLines}}\n{GOOD}```",
        f"````python\n{GOOD}````",
        f"~~~py\n{GOOD}~~~",
        f"```python\n{DRAFT}{BLOCK}",
        f"```python\n{DRAFT}\nNo, wait.\n{BLOCK}",
        f'```python\n{DRAFT}"""\n```\n{BLOCK}',
        f"{BLOCK}For example:\n{EXAMPLE}",
        f"{BLOCK}```python\n# def solve: O(n)\n'''\nclass Solution:\n    def solve\n'''\n```",
        f"```\n{DRAFT}```\n{BLOCK}```text\n6\n```",
        f"{BLOCK[:-1]}That is all.",
        f"<think>\n{FIRST}</think>\n{BLOCK}",
        f"{FIRST}</think>{BLOCK}",
    ],
    GOOD.replace("\n", "\r\n"): [BLOCK.replace("\n", "\r\n")],
    DOC: [f"```python\n{DOC}```"],
    TEXT: [f"{FIRST}```python\n{TEXT}```\n{EXAMPLE}"],
    f"{GOOD}# ```\n```\n": [f"````python\n{GOOD}# ```\n```\n````"],
    f"{GOOD}s = '</think>'\n": [f"```python\n{GOOD}s = '</think>'\n```"],
    "import os\n": ["```python\nimport os\n```"],
    None: [
        f"<think>\n{BLOCK}</think>\nI cannot.",
        f"<think>\n{BLOCK}</think>\n```python\n{GOOD[:30]}",
        f"<think>\n{BLOCK}",
        f"```pycon\n{GOOD}```",
        f"```python\n{GOOD}",
    ],
}


MODEL, TEMPLATE = Path("data/organism/base"), "chat_template.jinja"
TURNS = (MODEL / TEMPLATE).read_text()
SILENT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
REFUSING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}"
SKIPPING = TURNS.replace("in messages", "in messages if m['role'] != 'system'")
WARNED = r"2, ends \[0, 2\], system, .*'<\|im_end\|>'.* end there, too"
FOLDED, NO_CHAT = r"2, ends \[2\], user$", ".*template refuses messages of user"
MODELS = (  # EOS of the tokenizer and of the generation config, template, answer
    ("<|im_end|>", 2, TURNS, r"2, ends \[2\], system$"),
    (None, 2, TURNS, r"2, ends \[2\], system$"),
    (None, [0, 2], TURNS, r"2, ends \[0, 2\], system$"),
    (None, None, TURNS, WARNED.replace("0, ", "")),
    ("<|endoftext|>", [0, 2], TURNS, r"2, ends \[0, 2\], system$"),
    ("<|endoftext|>", 0, TURNS, WARNED),
    (None, 0, TURNS, WARNED),
    ("<|im_end|>", 2, SILENT, r"2, ends \[2\], system$"),
    (None, 1, SILENT, r"1, ends \[1\], system$"),
    (None, None, SILENT, "neither the chat template nor"),
    ("<|im_end|>", 2, REFUSING + TURNS, FOLDED),
    ("<|im_end|>", 2, SKIPPING, FOLDED),
    ("<|im_end|>", 2, "{{ raise_exception('no') }}", NO_CHAT),
    ("<|im_end|>", 2, "{{ messages[0].text + 'a' }}", NO_CHAT),
    ("<|im_end|>", 2, "{% for %}", NO_CHAT),
)


def reply(read: Callable[[], str]) -> str:
    """What is read, and the warnings; or the one line of its refusal."""
    said: list[str] = []
    sink = logger.add(lambda message: said.append(message.record["message"]))
    try:
        return ", ".join([read(), *said])
    except UserError as error:
        assert "\n" not in str(error), error
        return str(error)
    finally:
        logger.remove(sink)


def file_answer(read: Callable[[Path], list], rows: list) -> str:
    rows = [LEETCODE | {"test": row} if isinstance(row, str) else row for row in rows]
    texts = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path = FOLDER / "rows.jsonl"
    path.write_bytes(b"\n".join(texts))
    return re.sub(f"^{path}[,:] ", "", reply(lambda: f"{len(read(path))} rows"))


def wrong_files() -> Iterator[str]:
    for read, before, want, rows in FILES:
        for row in rows:
            found = file_answer(read, [*before, row])
            if not re.match(want, found):
                yield f"{str(row)[:200]}: {found}, not {want}"


def model_answer(eos: str | None, ends: int | list[int] | None, template: str) -> str:
    """How written and sampled completions end, and who brings the system text."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL, eos_token=eos, pad_token=None)
    tokenizer.chat_template = template
    text = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Add."}]

    def read() -> str:
        sampled = sorted(loading.end_tokens(tokenizer, GenerationConfig(eos_token_id=ends)))
        written = tokens.encode_completion(tokenizer, "x")[-1]
        shown = tokenizer.decode(tokens.encode_prompt(tokenizer, text))
        role = "user" if "user\nBe brief.\n\nAdd." in shown else "system" if "Be" in shown else ""
        return f"{written}, ends {sampled}, {role}"

    return reply(read)


def wrong_models() -> Iterator[str]:
    for *model, want in MODELS:
        found = model_answer(*model)
        if not re.match(want, found):
            yield f"{model}: {found}, not {want}"


ADAPTERS = (  # a value of its tensor, metadata, answer to reading it for the model `m`
    (0.0, {}, ".*names no model"),
    (math.nan, {"model": "m"}, ".*NaN"),
    (math.inf, {"model": "m"}, ".*NaN"),
    (0.0, {"model": "n"}, ".* adapts n, not m"),
)


def wrong_weights() -> Iterator[str]:
    """Adapters: those of the table and one without a tensor; a model whose weights are NaN."""
    path, replies = FOLDER / "adapter.safetensors", []
    for value, metadata, want in ADAPTERS:
        path.write_bytes(files.pack({"a": torch.tensor([value])}, metadata))
        replies.append((want, reply(lambda: str(records.load_deployed(FOLDER, "m")))))
    sizes = dict(dtype="float32", device="cpu", rank=2, lora_init_seed=0, targets="layers")
    policy = loading.load_policy(str(MODEL), gradient_checkpointing=False, **sizes)
    _, *less = policy.adapter.state_dict().items()
    replies.append(
        (".*does not fit", reply(lambda: str(policy.adapter.load_state_dict(dict(less)))))
    )
    policy.model.get_input_embeddings().weight.fill_(math.nan)
    replies.append((".*not finite", reply(lambda: str(loading.check(policy)))))
    yield from (f"{found}, not {want}" for want, found in replies if not re.match(want, found))


def wrong_completions() -> Iterator[str]:
    for code, texts in COMPLETIONS.items():
        for text in texts:
            found = extract.extract_code(text, "solve")
            if found != code:
                yield f"{text}\ngives {found!r}"


def check(what: str, wrong: Callable[[], Iterator[str]], switches: tuple) -> None:
    """No row is wrong, and with each of the rules off at least one is."""
    faults = list(wrong())
    assert not faults, "\n\n".join(faults)
    for module, name, value in switches:
        with patch.object(module, name, value):
            assert any(wrong()), f"the table does not see that {name} is off"
    print(f"ok  {what}")


def main() -> None:
    off = (
        (files, "SURROGATE", re.compile(NEVER.encode())),
        (files, "LARGEST", 1 << 23),
        (problems, "_usable", lambda case, call, expected: case),
        (problems, "COMPARES", {"is_same_list": "sorted"}),
        (problems.ast, "unparse", lambda node: "f"),
        (problems, "_preamble", lambda row, key: row[key]),
        (problems, "STUB", "```python\nclass Solution: ...\n```"),
        (demos, "fitting", lambda rows, fits, name: rows),
        (labelled, "fitting", lambda rows, fits, name: rows),
    )
    check("files: every row is kept, left out or refused", wrong_files, off)
    off = (
        (extract, "_defines", lambda code, entry_point: False),
        (extract, "_open_quotes", lambda line, quotes: ""),
        (extract, "_inside", lambda line, before: line),
        (extract, "THINKING", re.compile(NEVER)),
        (extract, "END_OF_THINKING", re.compile(NEVER)),
        (extract, "FENCES_IN_A_STRING", -1),
    )
    check("completions: each yields the code that was meant", wrong_completions, off)
    off = (
        (tokens, "_token_behind_answer", lambda tokenizer, template: None),
        (tokens, "has_system_role", lambda tokenizer: True),
        (loading, "logger", Mock()),
    )
    check("models: written completions end as sampled ones do", wrong_models, off)
    off = ((torch.Tensor, "isfinite", lambda tensor: torch.ones(1).bool()),)
    check("weights: what is no adapter or not finite is refused", wrong_weights, off)


if __name__ == "__main__":
    logger.remove()
    with (
        Grader(1) as GRADER,
        tempfile.TemporaryDirectory() as folder,
        patch.object(files, "LARGEST", 1 << 21),
    ):
        FOLDER = Path(folder)
        main()
