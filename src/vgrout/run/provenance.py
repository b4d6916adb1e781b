"""What ran: commit, command, versions, time."""

import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SOURCE = (":(top)", ":(top,exclude)data/records")  # finished runs are stored there, no code


def provenance() -> dict[str, Any]:
    """Return the RunRecord fields that say what ran: commit, dirty, argv, versions, started."""
    commit = _git(HERE, "rev-parse", "HEAD")
    packages = ("vgrout", "torch", "transformers", "safetensors", "numpy")
    return {
        "commit": commit or "unknown",  # an installed wheel has no repository
        "dirty": dirty(HERE),
        "argv": ["python", *sys.orig_argv[1:]],
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in packages},
        "started": now(),
    }


def dirty(folder: Path) -> bool:
    """Does the work tree around a folder differ from its commit?"""
    return bool(_git(folder, "status", "--porcelain", "--", *SOURCE))


def uncommitted(folder: Path = HERE) -> str:
    """The changes to tracked files around a folder since their commit, as a patch."""
    return _git(folder, "diff", "HEAD", "--", *SOURCE)


def now() -> str:
    """Return the present time, UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _git(folder: Path, *arguments: str) -> str:
    result = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
