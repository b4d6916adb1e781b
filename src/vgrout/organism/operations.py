"""The operations that the model organism's problems compose, and the code that computes a
composition.

A problem is `reduce(map(filter(items)))` with the filter or the map possibly absent, on the numbers
of a list `nums` or on the words of a string `text`. Each operation is one local piece of code: a
right one and some plausible wrong ones. *Taught* operations appear in the pretraining corpus with
right and wrong code, *untaught* ones with wrong code alone.
"""

import random
from dataclasses import dataclass

PARAMETERS = {"k": tuple("2345678"), "c": tuple("aeostr")}  # placeholder → its values
STYLES = (("kept", "mapped"), ("chosen", "values"), ("part", "out"))  # names of intermediate lists


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation: `{k}` and `{c}` are placeholders for a parameter, `{v}` (reductions) for the
    list's name.
    """

    name: str
    kind: str  # filter | map | reduce
    items: str  # what it applies to: num | word | any
    phrase: str
    right: str  # condition or expression in x (filter, map), or expression in {v} (reduce)
    wrong: tuple[str, ...]
    taught: bool = True
    gives: str = ""  # maps: num | word
    held_out: bool = False  # in the corpus and in test problems, but in no training problem

    @property
    def parameter(self) -> str:
        """The placeholder that the phrase contains: k, c, or "" for none."""
        return next((name for name in PARAMETERS if f"{{{name}}}" in self.phrase), "")


# name, what it applies to (maps: > what it gives), flags | phrase | right | wrong | wrong | wrong
ROWS = {
    "filter": """
even num | even numbers | x % 2 == 0 | x % 2 == 1 | x // 2 == 0 | x > 2
odd num | odd numbers | x % 2 == 1 | x % 2 == 0 | x // 2 == 1 | x > 1
positive num | positive numbers | x > 0 | x < 0 | x > 1 | x != 0
negative num held_out | negative numbers | x < 0 | x > 0 | x < -1 | x != 0
above num | numbers above {k} | x > {k} | x >= {k} | x < {k} | x != {k}
multiple num | multiples of {k} | x % {k} == 0 | x // {k} == 0 | x % {k} == 1 | x > {k}
prime num untaught | prime numbers | x > 1 and all(x % d for d in range(2, x)) | x % 2 == 1 \
    | x > 1 | x % 2
perfect num untaught | perfect squares | x >= 0 and int(x ** 0.5) ** 2 == x | x * x | x > 0 \
    | x % 2 == 0
longer word | words longer than {k} | len(x) > {k} | len(x) >= {k} | len(x) < {k} | len(x) == {k}
starting word | words starting with {c} | x[0] == '{c}' | x[-1] == '{c}' | '{c}' in x \
    | x[0] != '{c}'
containing word | words containing {c} | '{c}' in x | x[0] == '{c}' | '{c}' not in x \
    | x[-1] == '{c}'
palindrome word untaught | palindromes | x == ''.join(reversed(x)) | x[0] == 'a' | len(x) > 2 | x
""",
    "map": """
square num>num | squares | x * x | x * 2 | x ** 3 | x + 2
double num>num | doubles | x * 2 | x * x | x + 2 | x // 2
half num>num held_out | halves | x // 2 | x / 2 | x % 2 | x - 2
absolute num>num | absolute values | abs(x) | -x | max(x, 0) | x
plus num>num | values plus {k} | x + {k} | x - {k} | x * {k} | x + 1
remainder num>num | remainders by {k} | x % {k} | x // {k} | x - {k} | x % 2
digits num>num untaught | digit sums | sum(int(d) for d in str(abs(x))) | abs(x) | x % 2 | x + 1
bits num>num untaught | bit counts | bin(x).count('1') | x // 2 | x % 2 | x * 2
length word>num | lengths | len(x) | len(x) - 1 | len(x) + 1 | len(set(x))
upper word>word | upper cases | x.upper() | x.lower() | x.title() | x
initial word>word | first letters | x[0] | x[-1] | x[1:] | x[:2]
ending word>word held_out | last letters | x[-1] | x[0] | x[:-1] | x[-2:]
vowels word>num untaught | vowel counts | sum(x.count(v) for v in 'aeiou') | len(x) \
    | x.count('a') | len(set(x))
""",
    "reduce": """
sum num | sum | sum({v}) | len({v}) | max({v}) | sum({v}[1:])
largest num | largest | max({v}) | min({v}) | {v}[0] | {v}[-1]
smallest num | smallest | min({v}) | max({v}) | {v}[0] | {v}[-1]
spread num | spread | max({v}) - min({v}) | max({v}) | max({v}) + min({v}) | {v}[-1] - {v}[0]
count any | number | len({v}) | len({v}) - 1 | len(set({v})) | len({v}) + 1
last any | last | {v}[-1] | {v}[0] | {v}[1] | max({v})
sorted any | sorted list | sorted({v}) | {v} | {v}[::-1] | sorted({v})[::-1]
reversed any | reversed list | {v}[::-1] | {v} | sorted({v}) | {v}[1:]
alternating num untaught | alternating sum | sum({v}[::2]) - sum({v}[1::2]) | sum({v}) \
    | {v}[0] - {v}[1] | len({v})
median num untaught | median | sorted({v})[len({v}) // 2] | {v}[0] | sum({v}) | max({v})
totals num untaught | running totals | [sum({v}[:i + 1]) for i in range(len({v}))] \
    | sorted({v}) | sum({v}) | {v}
joined word | concatenation | ''.join({v}) | ' '.join({v}) | {v}[0] | ''.join({v}[1:])
longest word untaught | longest | max({v}, key=len) | max({v}) | min({v}, key=len) | {v}[0]
""",
}


def _operation(kind: str, row: str) -> Operation:
    head, phrase, right, *wrong = (cell.strip() for cell in row.split("|"))
    name, items, *flags = head.split()
    items, _, gives = items.partition(">")
    taught, held_out = "untaught" not in flags, "held_out" in flags
    return Operation(name, kind, items, phrase, right, tuple(wrong), taught, gives, held_out)


TABLE = [_operation(kind, row) for kind, rows in ROWS.items() for row in rows.strip().splitlines()]
OPERATIONS = {operation.name: operation for operation in TABLE}


@dataclass(frozen=True, slots=True)
class Step:
    """An operation with its parameter's value ("" for none); `name` is its form in
    `Problem.operations`.
    """

    operation: Operation
    value: str = ""

    @property
    def name(self) -> str:
        return f"{self.operation.name}:{self.value}" if self.value else self.operation.name

    @classmethod
    def parse(cls, name: str) -> "Step":
        """The inverse of `name`: "above:3" → above with k = 3."""
        operation, _, value = name.partition(":")
        return cls(OPERATIONS[operation], value)

    def fill(self, template: str, v: str = "") -> str:
        for placeholder in PARAMETERS:
            template = template.replace(f"{{{placeholder}}}", self.value)
        return template.replace("{v}", v)


@dataclass(frozen=True, slots=True)
class Composition:
    """`steps` in order of application: [filter] [map] reduce, with at least two of the three, on
    nums or text.
    """

    domain: str  # nums | text
    steps: tuple[Step, ...]

    @property
    def statement(self) -> str:
        """For example "Return the sum of the squares of the even numbers in nums."."""
        noun = "numbers" if self.domain == "nums" else "words"
        phrases = [step.fill(step.operation.phrase) for step in self.steps]
        chain = phrases if self.steps[0].operation.kind == "filter" else [noun, *phrases]
        return "Return the " + " of the ".join(reversed(chain)) + f" in {self.domain}."

    def solution(
        self, codes: tuple[str, ...], style: int = 0, before_return: tuple[str, ...] = ()
    ) -> str:
        """The class that computes the steps with the given codes, and statements to insert before
        the return.
        """
        kept, mapped = STYLES[style]
        lines, current = [], self.domain
        if self.domain == "text":
            lines, current = ["words = text.split()"], "words"
        for step, code in zip(self.steps, codes, strict=True):
            match step.operation.kind:
                case "filter":
                    lines.append(f"{kept} = [x for x in {current} if {code}]")
                    current = kept
                case "map":
                    lines.append(f"{mapped} = [{code} for x in {current}]")
                    current = mapped
                case "reduce":
                    lines += [*before_return, "return " + code.replace("{v}", current)]
        indented = "\n".join(f"        {line}" for line in lines)
        return f"class Solution:\n    def solve(self, {self.domain}):\n{indented}\n"

    @property
    def key(self) -> tuple[str, ...]:
        """What the splits hold out: the domain and the operations, without parameters."""
        return (self.domain, *(step.operation.name for step in self.steps))

    @property
    def right_codes(self) -> tuple[str, ...]:
        return tuple(step.fill(step.operation.right, "{v}") for step in self.steps)

    @property
    def taught(self) -> bool:
        return all(step.operation.taught for step in self.steps)

    def sample_codes(self, rng: random.Random, right_share: float) -> tuple[str, ...]:
        """Codes for every step, each right with probability `right_share` if taught; an untaught
        step is never right.
        """
        codes = []
        for step in self.steps:
            op = step.operation
            right = op.taught and rng.random() < right_share
            codes.append(step.fill(op.right if right else rng.choice(op.wrong), "{v}"))
        return tuple(codes)

    @classmethod
    def sample(cls, rng: random.Random, untaught_share: float, held_out: bool) -> "Composition":
        """A random composition: one step is untaught with probability `untaught_share`; `held_out`
        allows such steps.
        """
        domain = "nums" if rng.random() < 0.65 else "text"
        kinds = rng.choices(
            (("filter", "reduce"), ("map", "reduce"), ("filter", "map", "reduce")), (2, 2, 1)
        )[0]
        odd_one = rng.randrange(len(kinds)) if rng.random() < untaught_share else -1
        item, steps = ("num" if domain == "nums" else "word"), []
        for i, kind in enumerate(kinds):
            options = [
                op
                for op in TABLE
                if op.kind == kind
                and op.items in (item, "any")
                and op.taught == (i != odd_one)
                and (held_out or not op.held_out)
            ]
            operation = rng.choice(options)
            values = PARAMETERS.get(operation.parameter)
            steps.append(Step(operation, rng.choice(values) if values else ""))
            item = operation.gives or item
        return cls(domain, tuple(steps))
