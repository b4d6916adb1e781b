"""A record's config as a Config, and the command that repeats it."""

from dataclasses import fields
from typing import Any

from vgrout.arms import defaults
from vgrout.config import Config, options_of, with_options
from vgrout.core import Mode, UserError

# options that are gone: what every record has, or what no longer changes anything
GONE = {"llr_form": "ratio", "framing_pairs": None}
# options younger than some records, with what was done before there was a choice
YOUNGER = {"score_dtype": "float32", "absorb_share": 0.0, "kl_estimator": "k3"}


def config_of(preset: str, stored: dict[str, Any]) -> Config:
    """The Config that a record stores as JSON; UserError for a field that this version lacks."""
    flat = {k: v for values in stored.values() for k, v in values.items()}
    for name, value in GONE.items():
        if flat.pop(name, value) not in (value, None) and value is not None:
            raise UserError(f"the record's option {name} is gone: check out its commit")
    config = defaults(preset, flat["intervention"])
    usual = options_of(config)
    if odd := flat.keys() - usual.keys():
        raise UserError(
            f"the record has an option {min(odd)} that this version lacks: see its commit"
        )
    before = {k: v for k, v in YOUNGER.items() if k not in flat}
    values = {k: _as(usual[k], v) for k, v in flat.items()}
    return with_options(config, before | values)


def _as(usual: Any, value: Any) -> Any:
    """JSON → Python: every tuple of a Config is one of modes; a whole number may stand for a float."""
    if isinstance(usual, tuple):
        return tuple(map(Mode, value))
    return float(value) if isinstance(usual, float) else value


def argv_of(preset: str, config: Config) -> list[str]:
    """The arguments of `python -m vgrout.train` that give this config."""
    argv = [preset]
    name = config.run.intervention
    if name != "routeV":
        argv += ["--intervention", name]
    usual, given = options_of(defaults(preset, name)), options_of(config)
    for section in fields(config):
        for f in fields(getattr(config, section.name)):
            value = given[f.name]
            flag = f"--{f.name.replace('_', '-')}"
            if value == usual[f.name] or f.name == "intervention":
                continue
            if isinstance(value, bool):
                argv.append(flag if value else flag.replace("--", "--no-", 1))
            else:
                argv += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return argv
