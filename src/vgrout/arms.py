"""The arms, as lists of phases. An arm is a row of ARMS; the loop knows phases and no arm.

`python -m vgrout.arms` prints the page docs/method/arms.md.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Literal

from vgrout.config import (
    PRESETS,
    AbsorbBy,
    Action,
    Config,
    Control,
    Enter,
    PhaseConfig,
    Score,
    options_of,
    with_options,
)
from vgrout.core import UserError, Zone

THIRD = 3  # a first phase takes at most this fraction of a run, unless a flag says otherwise
NO_PAIRS = ("pinned", "judge", "probe")  # scores that read no pair
FLAGS = ("judge", "probe")  # scores that flag whole rollouts: live monitors


@dataclass(frozen=True)
class Phase:
    """Some steps of a run: what scores, what is done with flagged rows, who samples, what pays."""

    steps: int | None = None  # None: all that are left
    score: Score = "pinned"
    zone: Zone = Zone.ABSORB  # of a pinned score
    absorb_share: float = 0.0  # of rows pinned to RETAIN: this share, by chance, is in ABSORB
    absorb_by: AbsorbBy = "both"  # what those rows take from the quarantine
    cut: Literal["band", "midpoint", "zero"] = "band"
    control: Control = ""
    action: Action = "route"
    gen_deploy_frac: float = 0.0  # share of student rows sampled with the quarantine ablated
    retained_advantages: bool = False  # baseline among the rows that train the deployed block
    demonstrations: bool = True  # the teacher pool's, where there is one
    loophole_pays: bool = True
    enter: Enter = ""  # what takes the learned quarantine's place when the phase begins
    inoculate: bool = False  # the training prompt allows the exploit; evaluation does not

    @property
    def flags(self) -> bool:
        """The gate judges rollouts and not updates: rows with A = 0 have a zone too."""
        return self.action == "deduct" or self.score in FLAGS or self.control == "oracle"


@dataclass(frozen=True)
class Arm:
    phases: tuple[Phase, ...]
    deployed: Literal["ablated", "as_trained"]
    why: str  # the hypothesis, one sentence


# options of the last phase, which flags edit under their own names
EDITED = {f.name for f in fields(Phase)} & {f.name for f in fields(PhaseConfig)}
FIRST = Phase(20, zone=Zone.ROUTE)  # quarantine first: it alone trains, on every row
AFTER = Phase(gen_deploy_frac=1.0, retained_advantages=True, cut="zero", demonstrations=False)
RETAIN = replace(AFTER, zone=Zone.RETAIN)
ABSORB_SOME = replace(RETAIN, absorb_share=0.3)
RATIO = replace(AFTER, score="quarantine_ratio")


def _one(deployed: Literal["ablated", "as_trained"], why: str, **phase) -> Arm:
    return Arm((Phase(**phase),), deployed, why)


def _two(last: Phase, why: str, **first) -> Arm:
    return Arm((replace(FIRST, **first), last), "ablated", why)


ARMS = {
    "none": _one(
        "ablated", "Rank r alone trains: it hacks like plain GRPO, later.", zone=Zone.RETAIN
    ),
    "none2r": _one("as_trained", "Plain GRPO learns the loopholes, novel names included."),
    "no_loophole": _one(
        "as_trained", "Where no loophole pays, solving rises: the ceiling.", loophole_pays=False
    ),
    "absorb": _one("ablated", "Two blocks trained alike share the hack; ablation removes a part."),
    "inoculate": _one(
        "as_trained", "A prompt that permits the exploit keeps it to that prompt.", inoculate=True
    ),
    "routeV": _one("ablated", "Routing by v_grad deploys less hack than absorb.", score="v_grad"),
    "routeA": _one("ablated", "Routing by activations deploys less hack.", score="v_act"),
    "routeL": _one("ablated", "Routing by the pairs' likelihood ratio does.", score="llr"),
    "placebo": _one(
        "ablated", "A Haar-random direction does not do that.", score="v_grad", control="haar"
    ),
    "placeboA": _one("ablated", "Nor one in activations.", score="v_act", control="haar"),
    "placeboL": _one("ablated", "Nor random nudges.", score="llr", control="haar"),
    "placebo_semantic": _one(
        "ablated", "Nor pairs that mean nothing.", score="v_grad", control="semantic"
    ),
    "no_gateQ": _two(RETAIN, "A quarantine trained first does not help by being there."),
    "absorbQ": _two(ABSORB_SOME, "Rows shared with a quarantine that learned to hack protect."),
    "clipQ": _two(replace(ABSORB_SOME, absorb_by="clip"), "PPO's clip against it is enough."),
    "matched_absorbQ": _two(
        replace(ABSORB_SOME, enter="effect"), "A random quarantine of equal effect does not."
    ),
    "routeQ": _two(RATIO, "A quarantine that learned the hack finds it in deployed samples."),
    "placeboQ": _two(
        replace(RATIO, control="haar"), "A random delta at the same share does not find it."
    ),
    "filterQ": _two(replace(RATIO, action="filter"), "Dropping what routeQ routes does as well."),
    "penaltyQ": _two(replace(RATIO, action="deduct"), "So does taking the reward of passing."),
    "oracle": _one("ablated", "Routing by true labels: an upper bound.", control="oracle"),
    "judge": _one("ablated", "Routing by a live LLM judge.", score="judge"),
    "probe": _one("ablated", "Routing by a probe with another set's labels.", score="probe"),
}

# names of combinations that committed records use: the arm, and what its last phase does otherwise
ALIASES: dict[str, tuple[str, dict[str, object]]] = {
    "random_gate": ("routeV", {"control": "random"}),
    "confound_gate": ("routeV", {"control": "confound"}),
    "filterV": ("routeV", {"action": "filter"}),
    "filterA": ("routeA", {"action": "filter"}),
    "filterL": ("routeL", {"action": "filter"}),
    "advmodV": ("routeV", {"action": "penalise"}),
    "advmodA": ("routeA", {"action": "penalise"}),
    "advmodL": ("routeL", {"action": "penalise"}),
    "placebo_advmodL": ("placeboL", {"action": "penalise"}),
    "confound_advmodL": ("routeL", {"action": "penalise", "control": "confound"}),
    "random_gateQ": ("routeQ", {"control": "random"}),
    "confound_gateQ": ("routeQ", {"control": "confound"}),
    "advmodQ": ("routeQ", {"action": "penalise"}),
    "reset_absorbQ": ("absorbQ", {"enter": "reset"}),
    "solver_absorbQ": ("absorbQ", {"enter": "reset", "phase_pays": False}),
    "placebo_absorbQ": ("absorbQ", {"enter": "norm"}),
    "inverted_absorbQ": ("absorbQ", {"enter": "inverted"}),
    "filter_oracle": ("oracle", {"action": "filter"}),
    "penaltyJ": ("judge", {"action": "deduct"}),
    "filterJ": ("judge", {"action": "filter"}),
    "routeJ": ("judge", {}),
    "penaltyP": ("probe", {"action": "deduct"}),
    "filterP": ("probe", {"action": "filter"}),
    "routeP": ("probe", {}),
}


def resolved(name: str) -> tuple[str, dict[str, object]]:
    """The arm behind a name or an alias, and what its last phase does otherwise."""
    return ALIASES.get(name, (name, {}))


def arm_of(name: str) -> Arm:
    """The arm of a name or of an alias; UserError for any other."""
    arm, _ = resolved(name)
    if arm not in ARMS:
        known = ", ".join(ARMS)
        raise UserError(f"unknown arm {name!r}: --intervention takes one of {known}")
    return ARMS[arm]


# ── an arm's phases as options, which flags edit ─────────────────────────────────────────────────


def defaults(preset: str, intervention: str, steps: int = 0) -> Config:
    """The preset with the arm's phases written into its options; an unknown arm changes nothing.

    A first phase takes at most a third of a run, of `steps` or else of the preset's.
    """
    config = with_options(PRESETS[preset], {"intervention": intervention})
    name, changed = resolved(intervention)
    if (arm := ARMS.get(name)) is None:
        return config
    first, last = arm.phases[0], arm.phases[-1]
    options = {name: getattr(last, name) for name in EDITED}
    if first is not last:
        alone = min(first.steps, max(1, (steps or config.grpo.steps) // THIRD))
        options |= {"quarantine_first": alone, "teacher_until": alone}
        options["phase_pays"] = first.loophole_pays
    return with_options(config, options | changed)


def phases_of(config: Config) -> tuple[Phase, ...]:
    """The arm's phases as the options say, cut where demonstrations end."""
    arm, options = arm_of(config.run.intervention), config.phase
    edited = {name: getattr(options, name) for name in EDITED}
    if config.control.routeV_random_v_seed is not None:
        edited["control"] = "haar"
    last = replace(arm.phases[-1], **edited, steps=None)
    first = replace(
        FIRST,
        steps=options.quarantine_first,
        loophole_pays=last.loophole_pays and options.phase_pays,
        inoculate=last.inoculate,
    )
    whole = (first, last) if options.quarantine_first else (last,)
    until = config.data.teacher_until if config.data.teacher_pool else 0
    return tuple(_cut_at(whole, until))


def _cut_at(phases: tuple[Phase, ...], until: int) -> Iterator[Phase]:
    """The phases with demonstrations before step `until` and none from it on."""
    start = 0
    for phase in phases:
        shown = max(0, until - start)
        whole = phase.steps is not None and phase.steps <= shown
        if shown and not whole:
            yield replace(phase, steps=shown, demonstrations=True)
            rest = None if phase.steps is None else phase.steps - shown
            yield replace(phase, steps=rest, demonstrations=False, enter="")
        else:
            yield replace(phase, demonstrations=whole and bool(shown))
        start += phase.steps or 0


def deployed_state(config: Config) -> Literal["ablated", "as_trained"]:
    """The state that the arm deploys: actions that leave both blocks to train deploy both."""
    if config.phase.action != "route" and not config.phase.quarantine_first:
        return "as_trained"
    return arm_of(config.run.intervention).deployed


def trained_zone(config: Config) -> Zone:
    """The zone of rows that an action other than `route` leaves to train."""
    return Zone.ABSORB if deployed_state(config) == "as_trained" else Zone.RETAIN


def mixed_zones(config: Config) -> tuple[Zone, ...]:
    """The zones that one update after the first phase may mix."""
    last = phases_of(config)[-1]
    if last.action != "route":
        return (trained_zone(config),)
    pinned = last.score == "pinned" and not last.control
    return tuple(dict.fromkeys((last.zone, Zone.ABSORB))) if pinned else tuple(Zone)


def label(config: Config) -> str:
    """The arm's name as records and figures show it: a named arm, else one with what was changed.

    `routeV` with --control haar, or with --routeV-random-v-seed, is `placebo`, and `absorbQ` with
    --enter norm is `placebo_absorbQ`.
    """
    name, _ = resolved(config.run.intervention)
    shape, deployed, phases = _shape(config), deployed_state(config), len(arm_of(name).phases)
    for other, arm in ARMS.items():
        kin = len(arm.phases) == phases and arm.deployed == deployed
        if kin and _arm_shape(arm) == shape:
            return other
    own = _arm_shape(ARMS[name])
    for alias, (of, options) in ALIASES.items():
        if of == name and own | options == shape:
            return alias
    changed = [f"{key}={value or 'none'}" for key, value in shape.items() if own[key] != value]
    return "+".join([name, *changed])


SHAPE = "score control action enter zone loophole_pays inoculate absorb_by".split()


def _shape(config: Config) -> dict[str, object]:
    last, options = phases_of(config)[-1], config.phase
    shape = {key: getattr(last, key) for key in SHAPE} | {"enter": options.enter}
    shared = bool(options.absorb_share) and last.score == "pinned"
    return shape | {"phase_pays": options.phase_pays, "absorb": shared}


def _arm_shape(arm: Arm) -> dict[str, object]:
    first, last = arm.phases[0], arm.phases[-1]
    shape = {key: getattr(last, key) for key in SHAPE}
    pays = first.loophole_pays or first is last
    return shape | {"phase_pays": pays, "absorb": bool(last.absorb_share)}


# ── which options an arm reads ───────────────────────────────────────────────────────────────────

Reads = Callable[[Config], bool]


def _score(*names: str) -> Reads:
    return lambda config: config.phase.score in names


def _control(*names: str) -> Reads:
    return lambda config: phases_of(config)[-1].control in names


def _action(*names: str) -> Reads:
    return lambda config: config.phase.action in names


def _either(*reads: Reads) -> Reads:
    return lambda config: any(one(config) for one in reads)


def reads_pairs(config: Config) -> bool:
    """The arm's score or its cut needs pairs."""
    fixed = config.phase.score == "quarantine_ratio" and config.phase.cut == "zero"
    return config.phase.score not in NO_PAIRS and not fixed


def _seeds(config: Config) -> bool:
    return config.phase.seed_quarantine > 0


def _seeds_placebo(config: Config) -> bool:
    return _seeds(config) and config.phase.seed_side == "placebo"


def _two_phases(config: Config) -> bool:
    return config.phase.quarantine_first > 0


def _scored(config: Config) -> bool:
    return config.phase.score != "pinned"


def _shares(config: Config) -> bool:
    return config.phase.absorb_share > 0


def _pool(config: Config) -> bool:
    return bool(config.data.teacher_pool)


def _random_quarantine(config: Config) -> bool:
    return config.phase.enter in ("norm", "effect")


def _is_route_v(config: Config) -> bool:
    return config.run.intervention == "routeV"


READERS: dict[str, tuple[Reads, str]] = {  # options → who reads them, and in words
    "pairs pair_modes": (_either(reads_pairs, _seeds), "a score that reads pairs"),
    "placebo_pairs": (
        _either(_control("semantic"), _seeds_placebo),
        "placebo_semantic, or --seed-side placebo",
    ),
    "teacher_modes teacher_per_group": (_pool, "a --teacher-pool"),
    "signed cut": (_scored, "a score"),
    "refresh_every": (
        _either(reads_pairs, _score("probe"), _control("haar")),
        "a score or control that is refreshed",
    ),
    "granularity probe_state probe_positions score_sign": (_score("v_grad"), "the score v_grad"),
    "centred": (_score("v_grad", "v_act"), "the scores v_grad and v_act"),
    "act_space": (_score("v_act", "probe"), "the scores v_act and probe"),
    "llr_steps llr_learning_rate": (_score("llr"), "the score llr"),
    "confound": (_control("confound"), "--control confound"),
    "placebo_seed": (
        _either(_control("haar", "random"), _random_quarantine),
        "a random control or quarantine",
    ),
    "oracle_recall oracle_fpr oracle_modes": (_control("oracle"), "the arm oracle"),
    "penalty_alpha": (_action("penalise"), "--action penalise"),
    "penalty": (_action("deduct"), "--action deduct"),
    "phase_pays enter": (_two_phases, "a first phase: --quarantine-first"),
    "seed_side": (_seeds, "--seed-quarantine"),
    "absorb_by": (_shares, "--absorb-share"),
    "routeV_random_v_seed": (_is_route_v, "--intervention routeV"),
    "judge_url judge_model judge_concurrency judge_timeout judge_retries judge_max_tokens": (
        _score("judge"),
        "the score judge",
    ),
    "probe_data probe_rows probe_l2": (_score("probe"), "the score probe"),
}


def unread(preset: str, config: Config) -> Iterator[str]:
    """One line for each option that differs from its default and that the arm does not read."""
    usual, given = options_of(defaults(preset, config.run.intervention)), options_of(config)
    for names, (reads, readers) in READERS.items():
        changed = [name for name in names.split() if given[name] != usual[name]]
        for name in () if reads(config) else changed:
            what = f"--{name.replace('_', '-')} is not read by {config.run.intervention}"
            yield f"{what}: leave it out, it needs {readers}"


def page() -> str:
    """docs/method/arms.md: every named arm with its phases."""
    lines = [
        "# The arms",
        "",
        "Made by `python -m vgrout.arms`. A phase is data; flags edit the last one: `--score`,",
        "`--control`, `--action`, `--enter`, `--cut`, `--absorb-share`, `--gen-deploy-frac`;",
        "`--quarantine-first` sets the first.",
        "",
        "| arm | phases | deployed | hypothesis |",
        "|---|---|---|---|",
    ]
    for name, arm in ARMS.items():
        phases = "; ".join(map(_words, arm.phases))
        lines.append(f"| `{name}` | {phases} | {arm.deployed.replace('_', ' ')} | {arm.why} |")
    return "\n".join(lines) + "\n"


def _words(phase: Phase) -> str:
    score = phase.zone.name if phase.score == "pinned" else phase.score
    parts = (
        f"{phase.steps} steps" if phase.steps else "",
        score,
        f"{phase.absorb_share:g} in ABSORB" if phase.absorb_share else "",
        f"by {phase.absorb_by}" if phase.absorb_by != "both" else "",
        f"control {phase.control}" if phase.control else "",
        phase.action if phase.action != "route" else "",
        f"quarantine: {phase.enter}" if phase.enter else "",
        "sampled as deployed" if phase.gen_deploy_frac == 1 else "",
        "" if phase.loophole_pays else "loophole does not pay",
    )
    return ", ".join(filter(None, parts))


if __name__ == "__main__":
    print(page(), end="")
