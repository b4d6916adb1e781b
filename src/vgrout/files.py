"""Files that are never half written, and the one reader of JSON: atomic replacement, strict JSON,
safetensors.

No pickle anywhere. JSON written here has no NaN or infinity: they become null, so that any reader
can parse it. Torch is imported by the two functions that move tensors, and by no other.
"""

import gzip
import hashlib
import json
import math
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vgrout.core import UserError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
MEND = "correct or remove the row"
GZIP = b"\x1f\x8b"  # the first bytes of a gzip member
LARGEST = 1 << 30  # bytes that a gzip member may unpack to: ours have a few million
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # the escape of half a character


# ---- reading -------------------------------------------------------------------------------------
def parse_object(text: bytes, where: str, mend: str = MEND) -> dict[str, Any]:
    """One JSON object, in UTF-8 with or without a byte order mark.

    UserError, one line that begins with `where` and ends with `mend`, for anything else: no JSON,
    no UTF-8, another value than an object, a number of more digits than Python converts, nesting
    too deep, half a surrogate pair (no text can hold it).
    """
    try:
        row = json.loads(text.decode("utf-8-sig"))
        if SURROGATE.search(text):
            json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not readable as JSONL ({error}); {mend}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON object is expected, not {type(row).__name__}; {mend}")
    return row


def read_json_lines(
    path: str | Path, mend: str = MEND, partial: bool = False
) -> Iterator[tuple[dict[str, Any], str]]:
    """(row, "path, line n") for every line that is not blank, of a plain or gzipped file, whatever
    its name ends in.

    UserError, with file and line, for a file that cannot be read or is cut short, and for a line
    that `parse_object` refuses. `partial`: a last line, or a last gzip member, that a kill cut
    short is left out instead.
    """
    number = 0
    try:
        for number, line in enumerate(_lines(Path(path), partial), 1):
            if line.strip():
                where = f"{path}, line {number}"
                yield parse_object(line, where, mend), where
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {mend}") from None
    except (EOFError, zlib.error) as error:
        raise UserError(
            f"{path}, line {number + 1}: not readable as JSONL ({error}); {mend}"
        ) from None


def _lines(path: Path, partial: bool) -> Iterator[bytes]:
    """Lines as bytes: text may hold other line ends than "\\n" inside a value. Gzip members may end
    anywhere in a line.
    """
    data, rest = path.read_bytes(), b""
    if not data.startswith(GZIP):
        data, rest = b"", data
    while data:
        member = zlib.decompressobj(wbits=31)
        text = member.decompress(data, LARGEST)
        if member.unconsumed_tail:
            raise EOFError(f"it unpacks to more than {LARGEST >> 20} MiB")
        if member.eof:
            *lines, rest = (rest + text).split(b"\n")
            yield from lines
        elif not partial:
            raise EOFError("the file is cut short")
        data = member.unused_data.lstrip(b"\0")
    *lines, last = rest.split(b"\n")
    yield from lines if partial else [*lines, last]


def sha256_file(path: str | Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_tensors(path: str | Path) -> tuple[dict[str, "torch.Tensor"], dict[str, str]]:
    """Read tensors (on the CPU) and metadata of a safetensors file that this module wrote."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("vgrout", "{}"))
            return {key: file.get_tensor(key) for key in file.keys()}, metadata
    except Exception as error:  # safetensors' own type is no subclass of a narrower one
        raise UserError(f"{path} is not a readable safetensors file ({error})") from None


# ---- writing -------------------------------------------------------------------------------------
def append_line(path: Path, row: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(dumps(row) + "\n")


def nested(parts: dict[Any, dict[str, T]]) -> dict[str, T]:
    """Dicts as one: {"adamw": {"step": x}} → {"adamw.step": x}; `part` is the way back."""
    return {f"{part}.{key}": value for part, own in parts.items() for key, value in own.items()}


def part(state: dict[str, T], name: str) -> dict[str, T]:
    prefix = f"{name}."
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def gzip_lines(rows: list[dict[str, Any]]) -> bytes:
    """Rows as JSON lines in a gzip member of their own; equal rows give equal bytes."""
    return gzip.compress("".join(dumps(row) + "\n" for row in rows).encode(), mtime=0)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a temporary file beside `path`, sync it, rename it over `path` and sync the folder."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def pack(tensors: dict[str, "torch.Tensor"], metadata: dict[str, str]) -> bytes:
    """Serialise tensors. One metadata key holds them all as JSON: safetensors writes several in
    random order.
    """
    from safetensors.torch import save

    return save(
        {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()},
        {"vgrout": json.dumps(metadata, sort_keys=True)},
    )


def dumps(value: Any, indent: int | None = None) -> str:
    """JSON text that can be encoded: half a surrogate pair stays JSON's escape for it."""
    text = json.dumps(
        _finite(value), default=plain, indent=indent, allow_nan=False, ensure_ascii=False
    )
    return text.encode("utf-8", "backslashreplace").decode()


def _finite(value: Any) -> Any:
    """Replace NaN and infinities by None, in depth, and numpy or tensor scalars by Python's."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    value = value if value is None or isinstance(value, str | int | float | bool) else plain(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy arrays and scalars, tensors
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")
