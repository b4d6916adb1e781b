"""The inputs of `verify_cases.py`, as tables: nothing here is computed."""

import gzip
import math
from pathlib import Path

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


# reader, rows before the one in question, answer, rows in question; text is a test of LEETCODE
LEFT_OUT = "1 rows, .*1 of 2 rows left out"
FILES: tuple[tuple[str, list, str, list], ...] = (
    ("lines", [], "2 rows", [b"\xef\xbb\xbf{}\n\n \r\n{}", TWO, TWO + b"\0\0"]),
    ("absent", [], ".*download-data", [{}]),
    ("lines", [], "line 1: .*cut short", [TWO[:-9], TWO[:20]]),
    ("lines", [], "line 1: .*unpacks to more than", [gzip.compress(bytes(1 << 22))]),
    ("lines", [], "line 1: not readable", [TWO[:12] + b"!" + TWO[13:], b"{", DEEP.encode()]),
    ("partial", [], "2 rows", [TWO + TWO[:-9], b'{}\n{}\n{"a"']),
    ("lines", [{}], "2 rows", ['{"a": "\\ud83d\\ude00 \u2028", "b": NaN}'.encode()]),
    ("lines", [{}], "line 2: .*", [b"\xff", b"[]", b"null", {"\udc00": 1}, BIG.encode()]),
    ("pool", [DEMO], "line 2: .*", [DEMO | HALF, DEEP.encode(), BIG.encode(), b"\xff"]),
    ("pool", [DEMO], LEFT_OUT, [DEMO | LONG]),
    ("pool", [], "every demonstration is longer", [DEMO | LONG]),
    ("probe", ROLLOUTS, "line 25: .*", [ROLLOUT | HALF, DEEP.encode(), BIG.encode(), b"\xff"]),
    ("probe", ROLLOUTS, "24 rows, .*1 of 25 rows left out", [ROLLOUT | LONG]),
    ("problems", [OWN], "line 2: .*surrogates", [LEETCODE | {"query": "\udc00"}]),
    ("problems", [LEETCODE], "line 2: .*surrogates", [OWN | {"problem_id": "\ud83d"}]),
    (
        "problems",
        [OWN],
        "2 rows",
        [
            "assert Solution().f(*[1], k = 2) == 1, 'why'",
            "def check(c):\n    assert c(**{'n': [1]}) == [-inf, {1: ()}]",
            "def t(c):\n    assert is_same_list(c(1), list_node([1]))",
        ],
    ),
    (
        "problems",
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
        "problems",
        [LEETCODE],
        LEFT_OUT + ".*line 2: ",
        [case("[1]", "{[1]}"), case("[1]", DIGITS), case("[1]", "..."), case("[1]", "f(1)")],
    ),
    (
        "problems",
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
        "problems",
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
    ("problems", [OWN], "line 2: the fields match no known schema", [{"question": "?"}]),
    ("problems", [OWN], r"line 2: duplicate problem id 'a' \(first on line 1\)", [OWN]),
    ("problems", [], "no usable problem", ["# none", "assert f(1)"]),
    ("run_tests", [OWN], "2 rows", ["assert f(k) == 3"]),
    ("run_tests", [OWN], "line 2: the arguments of a test", ["assert f(a) == 3"]),
    ("run_tests", [OWN], "line 2: .*absent", [LEETCODE | {"prompt": "import absent"}]),
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
    ("<|im_end|>", 2, "{{ 'Yes, it is.' }}", ".*template does not show the user's text"),
)
ADAPTERS = (  # a value of its tensor, metadata, answer to reading it for the model `m`
    (0.0, {}, ".*names no model"),
    (math.nan, {"model": "m"}, ".*NaN"),
    (math.inf, {"model": "m"}, ".*NaN"),
    (0.0, {"model": "n"}, ".* adapts n, not m"),
)
