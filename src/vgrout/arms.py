"""The arms, as lists of phases. An arm is a row of ARMS; the loop knows phases and no arm.

`python -m vgrout.arms` prints the page docs/method/arms.md.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from vgrout.config import PRESETS, Action, Config, Control, Enter, Score, options_of, with_options
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


def arm_of(name: str) -> Arm:
    """The arm of a name or of an alias; UserError for any other."""
    found, _ = ALIASES.get(name, (name, {}))
    if found not in ARMS:
        known = ", ".join(ARMS)
        raise UserError(f"unknown arm {name!r}: --intervention takes one of {known}")
    return ARMS[found]


# ── an arm's phases as options, which flags edit ─────────────────────────────────────────────────


def defaults(
    preset: str,
    intervention: str,
) -> Config:
    """The preset with the arm's phases written into its options; an unknown arm changes nothing."""
    config = with_options(PRESETS[preset], {"intervention": intervention})
    name, changed = ALIASES.get(intervention, (intervention, {}))
    if (arm := ARMS.get(name)) is None:
        return config
    last = arm.phases[-1]
    options = {k: getattr(last, k) for k in options_of(config) if hasattr(last, k) and k != "steps"}
    if len(arm.phases) > 1:
        first = arm.phases[0]
        steps = min(first.steps, max(1, config.grpo.steps // THIRD))
        options |= {
            "quarantine_first": steps,
            "phase_pays": first.loophole_pays,
            "teacher_until": steps,
        }
    return with_options(config, options | changed)


def phases_of(config: Config) -> tuple[Phase, ...]:
    """The arm's phases as the options say, cut where demonstrations end."""
    arm, options = arm_of(config.run.intervention), config.phase
    random_v = config.control.routeV_random_v_seed is not None
    edited = {
        "score": options.score,
        "control": "haar" if random_v else options.control,
        "action": options.action,
        "cut": options.cut,
        "absorb_share": options.absorb_share,
        "gen_deploy_frac": options.gen_deploy_frac,
        "retained_advantages": options.retained_advantages,
        "enter": options.enter,
    }
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


def _cut_at(
    phases: tuple[Phase, ...],
    until: int,
) -> Iterator[Phase]:
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
    arm = arm_of(config.run.intervention)
    single = config.phase.quarantine_first == 0
    if config.phase.action != "route" and single:
        return "as_trained"
    return arm.deployed


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
    name, _ = ALIASES.get(config.run.intervention, (config.run.intervention, {}))
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


SHAPE = ("score", "control", "action", "enter", "zone", "loophole_pays", "inoculate")


def _shape(config: Config) -> dict[str, object]:
    last = phases_of(config)[-1]
    entered = config.phase.enter
    shape = {key: getattr(last, key) for key in SHAPE} | {"enter": entered}
    shared = bool(config.phase.absorb_share) and last.score == "pinned"
    return shape | {"phase_pays": config.phase.phase_pays, "absorb": shared}


def _arm_shape(arm: Arm) -> dict[str, object]:
    first, last = arm.phases[0], arm.phases[-1]
    shape = {key: getattr(last, key) for key in SHAPE}
    pays = first.loophole_pays or len(arm.phases) == 1
    return shape | {"phase_pays": pays, "absorb": bool(last.absorb_share)}


# ── which options an arm reads ───────────────────────────────────────────────────────────────────

Reads = Callable[[Config, tuple[Phase, ...]], bool]


def _score(*names: str) -> Reads:
    return lambda config, phases: config.phase.score in names


def _control(*names: str) -> Reads:
    return lambda config, phases: phases[-1].control in names


def _action(*names: str) -> Reads:
    return lambda config, phases: config.phase.action in names


def _two_phases(
    config: Config,
    phases: tuple[Phase, ...],
) -> bool:
    return config.phase.quarantine_first > 0


def reads_pairs(config: Config) -> bool:
    """The arm's score or its cut needs pairs."""
    fixed = config.phase.score == "quarantine_ratio" and config.phase.cut == "zero"
    return config.phase.score not in NO_PAIRS and not fixed


def _pairs(
    config: Config,
    phases: tuple[Phase, ...],
) -> bool:
    return reads_pairs(config) or config.phase.seed_quarantine > 0


def _scored(
    config: Config,
    phases: tuple[Phase, ...],
) -> bool:
    return config.phase.score != "pinned"


def _pool(
    config: Config,
    phases: tuple[Phase, ...],
) -> bool:
    return bool(config.data.teacher_pool)


def _random_delta(
    config: Config,
    phases: tuple[Phase, ...],
) -> bool:
    return phases[-1].control in ("haar", "random") or config.phase.enter in ("norm", "effect")


def _refreshed(
    config: Config,
    phases: tuple[Phase, ...],
) -> bool:
    score = config.phase.score
    return reads_pairs(config) or score == "probe" or phases[-1].control == "haar"


READERS: dict[str, tuple[Reads, str]] = {
    "pairs": (_pairs, "a score that reads pairs"),
    "pair_modes": (_pairs, "a score that reads pairs"),
    "placebo_pairs": (
        lambda config, phases: phases[-1].control == "semantic" or _seeds(config, "placebo"),
        "placebo_semantic, or --seed-side placebo",
    ),
    "teacher_modes": (_pool, "a --teacher-pool"),
    "teacher_per_group": (_pool, "a --teacher-pool"),
    "signed": (_scored, "a score"),
    "cut": (_scored, "a score"),
    "refresh_every": (_refreshed, "a score or control that is refreshed"),
    "granularity": (_score("v_grad"), "the score v_grad"),
    "probe_state": (_score("v_grad"), "the score v_grad"),
    "probe_positions": (_score("v_grad"), "the score v_grad"),
    "score_sign": (_score("v_grad"), "the score v_grad"),
    "centred": (_score("v_grad", "v_act"), "the scores v_grad and v_act"),
    "metric": (_score("v_grad", "v_act"), "the scores v_grad and v_act"),
    "act_space": (_score("v_act", "probe"), "the scores v_act and probe"),
    "act_layer": (_score("v_act", "probe"), "the scores v_act and probe"),
    "llr_steps": (_score("llr"), "the score llr"),
    "llr_learning_rate": (_score("llr"), "the score llr"),
    "confound": (_control("confound"), "--control confound"),
    "placebo_seed": (_random_delta, "a random control or quarantine"),
    "oracle_recall": (_control("oracle"), "the arm oracle"),
    "oracle_fpr": (_control("oracle"), "the arm oracle"),
    "oracle_modes": (_control("oracle"), "the arm oracle"),
    "penalty_alpha": (_action("penalise"), "--action penalise"),
    "penalty": (_action("deduct"), "--action deduct"),
    "phase_pays": (_two_phases, "a first phase: --quarantine-first"),
    "enter": (_two_phases, "a first phase: --quarantine-first"),
    "seed_side": (lambda config, phases: config.phase.seed_quarantine > 0, "--seed-quarantine"),
    "routeV_random_v_seed": (
        lambda config, phases: config.run.intervention == "routeV",
        "--intervention routeV",
    ),
} | {
    f"{monitor}_{name}": (_score(monitor), f"the score {monitor}")
    for monitor, names in (
        ("judge", ("url", "model", "concurrency", "timeout", "retries", "max_tokens")),
        ("probe", ("data", "rows", "l2")),
    )
    for name in names
}


def _seeds(
    config: Config,
    side: str,
) -> bool:
    return config.phase.seed_quarantine > 0 and config.phase.seed_side == side


def unread(
    preset: str,
    config: Config,
) -> Iterator[str]:
    """One line for each option that differs from its default and that the arm does not read."""
    usual, given = options_of(defaults(preset, config.run.intervention)), options_of(config)
    phases = phases_of(config)
    for name, (reads, readers) in READERS.items():
        if given[name] != usual[name] and not reads(config, phases):
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
    parts = [f"{phase.steps} steps" if phase.steps else "", score]
    parts += [f"{phase.absorb_share:g} in ABSORB" if phase.absorb_share else ""]
    parts += [f"control {phase.control}" if phase.control else ""]
    parts += [phase.action if phase.action != "route" else ""]
    parts += [f"quarantine: {phase.enter}" if phase.enter else ""]
    parts += ["sampled as deployed" if phase.gen_deploy_frac == 1 else ""]
    parts += ["" if phase.loophole_pays else "loophole does not pay"]
    return ", ".join(filter(None, parts))


if __name__ == "__main__":
    print(page(), end="")
