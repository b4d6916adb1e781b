"""A record's config as a Config, and the command that repeats it."""

from dataclasses import fields
from typing import Any

from vgrout.config import ADDED, PRESETS, Config
from vgrout.core import Mode, UserError


def config_of(stored: dict[str, Any]) -> Config:
    """The Config that a record stores as JSON; UserError for a field that this version does not have."""
    sections = {}
    for section in fields(Config):
        default, values = (
            getattr(Config(), section.name),
            ADDED.get(section.name, {}) | stored.get(section.name, {}),
        )
        if odd := values.keys() ^ {f.name for f in fields(default)}:
            raise UserError(
                f"the record's config differs from this version in {section.name}.{min(odd)}: check out its commit"
            )
        sections[section.name] = type(default)(
            **{k: _as(getattr(default, k), v) for k, v in values.items()}
        )
    return Config(**sections)


def _as(default: Any, value: Any) -> Any:
    """JSON → Python: every tuple of a Config is one of modes, and a whole number may stand for a float."""
    return (
        tuple(map(Mode, value))
        if isinstance(default, tuple)
        else float(value)
        if isinstance(default, float)
        else value
    )


def argv_of(preset: str, config: Config) -> list[str]:
    """The arguments of `python -m vgrout.train` that give this config: the preset, and every flag that differs from it."""
    argv = [preset]
    for section in fields(Config):
        base, own = getattr(PRESETS[preset], section.name), getattr(config, section.name)
        for f in fields(own):
            value = getattr(own, f.name)
            if value == getattr(base, f.name):
                continue
            flag = f.name.replace("_", "-")
            if isinstance(value, bool):
                argv.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                argv += [f"--{flag}", *map(str, value if isinstance(value, tuple) else (value,))]
    return argv
