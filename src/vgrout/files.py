"""Files that are never half written: atomic replacement, strict JSON, safetensors.

No pickle anywhere. JSON written here has no NaN or infinity: they become null, so that any reader can parse it.
"""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from vgrout.core import UserError


def sha256_file(path: str | Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors (on the CPU) and metadata of a safetensors file that this module wrote."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("vgrout", "{}"))
            return {key: file.get_tensor(key) for key in file.keys()}, metadata
    except (
        Exception
    ) as error:  # safetensors raises its own type, which is no subclass of a narrower one
        raise UserError(f"{path} is not a readable safetensors file ({error})") from None


def append_line(path: Path, row: dict[str, Any]) -> None:
    with open(path, "a") as file:
        file.write(dumps(row) + "\n")


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


def pack(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Serialise tensors. One metadata key holds them all as JSON: safetensors writes several in random order."""
    return save(
        {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()},
        {"vgrout": json.dumps(metadata, sort_keys=True)},
    )


def dumps(value: Any, indent: int | None = None) -> str:
    return json.dumps(
        _finite(value), default=plain, indent=indent, allow_nan=False, ensure_ascii=False
    )


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
