"""Files that are never half written: atomic replacement, strict JSON, safetensors, and the process's random states.

No pickle anywhere. JSON written here has no NaN or infinity: they become null, so that any reader can parse it.
"""

import hashlib
import json
import math
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from vgrout.types import UserError


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
    except Exception as error:  # safetensors raises its own type, which is no subclass of a narrower one
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
    return json.dumps(_finite(value), default=plain, indent=indent, allow_nan=False, ensure_ascii=False)


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


def random_states() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the global random states of torch (byte tensors, one per CUDA device too), python and numpy (JSON)."""
    tensors = {"random.torch": torch.get_rng_state()}
    tensors |= {f"random.cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    version, words, gauss = random.getstate()
    of_numpy = json.loads(json.dumps(np.random.get_state(legacy=False), default=plain))
    return tensors, {"python": [version, list(words), gauss], "numpy": of_numpy}


def set_random_states(tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Restore what `random_states` returned; tensors of other names are ignored."""
    torch.set_rng_state(tensors["random.torch"])
    for i in range(torch.cuda.device_count()):
        torch.cuda.set_rng_state(tensors[f"random.cuda{i}"], i)
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    key = np.array(state["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state(state["numpy"] | {"state": state["numpy"]["state"] | {"key": key}})
