"""Inputs that people bring: every row of these tables is answered as it says, none by a traceback.

A row of a file is kept, left out and counted, or refused in one line with file and line. A
completion yields the code that was meant. Every rule is switched off once: some row then fails.
"""

import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock, patch

import torch
from loguru import logger
from scripts.verify.cases import ADAPTERS, COMPLETIONS, FILES, LEETCODE, MODEL, MODELS, NEVER
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


READERS = {
    "lines": lines,
    "absent": absent,
    "partial": partial,
    "pool": pool,
    "probe": probe,
    "problems": load_problems,
    "run_tests": run_tests,
}


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
            found = file_answer(READERS[read], [*before, row])
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
