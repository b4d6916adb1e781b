"""A record's config as a Config, and the command that repeats it."""

from typing import Any

from vgrout.arms import defaults
from vgrout.config import Config, options_of, with_options
from vgrout.core import Mode, UserError

# options that are gone: what every record has, or what no longer changes anything
GONE = {
    "llr_form": "ratio",
    "metric": "cosine",
    "act_layer": "all",
    "framing_pairs": None,
    "score_dtype": None,
    "track": None,
}
# options younger than some records, with what was done before there was a choice
YOUNGER = {"absorb_share": 0.0, "absorb_by": "both", "kl_estimator": "k3"}


def config_of(preset: str, stored: dict[str, Any]) -> Config:
    """The Config that a record stores as JSON; UserError for a field that this version lacks."""
    flat = {}
    for section in stored.values():
        flat |= section
    for name, value in GONE.items():
        if flat.pop(name, value) not in (value, None) and value is not None:
            raise UserError(f"the record's option {name} is gone: check out its commit")
    config = defaults(preset, flat["intervention"])
    usual = options_of(config)
    if odd := flat.keys() - usual.keys():
        what = f"the record has an option {min(odd)} that this version lacks"
        raise UserError(f"{what}: see its commit")
    values = {k: _as(usual[k], v) for k, v in flat.items()}
    return with_options(config, YOUNGER | values)


def _as(usual: Any, value: Any) -> Any:
    """JSON → Python: every tuple is one of modes; a whole number may stand for a float."""
    if isinstance(usual, tuple):
        return tuple(map(Mode, value))
    return float(value) if isinstance(usual, float) else value


def argv_of(preset: str, config: Config) -> list[str]:
    """The arguments of `python -m vgrout.train` that give this config."""
    arm = config.run.intervention
    argv = [preset]
    if arm != "routeV":
        argv += ["--intervention", arm]
    usual = options_of(defaults(preset, arm))
    for name, value in options_of(config).items():
        flag = f"--{name.replace('_', '-')}"
        if value == usual[name]:
            continue
        if isinstance(value, bool):
            argv.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            argv += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return argv
