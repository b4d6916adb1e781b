# vGROUT. `uv run just --list` shows the recipes; arguments after a recipe's name reach the script behind it.

set positional-arguments

# recipes find the environment's programs, whether it is active or not
export PATH := justfile_directory() + "/.venv/bin:" + env_var_or_default("PATH", "")

runs := "out/runs"

# List the recipes.
default:
    @just --list

# Train none2r and routeQ on the organism side by side, print both 2×2 tables, draw out/figs/demo.png (≤ 6 minutes).
demo *ARGS:
    python scripts/view/demo.py "$@"

# The gate before every run: every scripts/verify/verify_*.py and a tiny routeV run, with shapes checked (≤ 4 minutes).
smoke:
    python scripts/verify/smoke.py

# `smoke`, and a tiny run of every arm.
smoke-all:
    python scripts/verify/smoke.py --arms

# The long forms of the checks: every arm killed in every phase, 500 steps watched for leaks, …
verify-long:
    python scripts/verify/smoke.py --long
    python scripts/verify/soak_train.py

# Re-evaluate the saved adapter of runs and compare with what their records say, e.g. `just verify-record out/runs/demo_routeQ`.
verify-record *RUNS:
    python scripts/verify/verify_record.py "$@"

# Every score against random directions and confounds on stored rollouts of runs with --snapshot-every: tables and figure in out/audit.
audit *RUNS:
    python scripts/analysis/diag_pinning.py "$@"

# The shrinkage null: does a deployed policy lie above what plain GRPO offers for less training? (RUN … --against NONE2R …)
frontier *RUNS:
    python scripts/analysis/after.py frontier "$@"

# The deployed policy as the quarantine's delta is scaled from 0 to 1.
forget *RUNS:
    python scripts/analysis/after.py forget "$@"

# How far each run's quarantine pushes the base at every snapshot, against random ones of its norm, and what it does alone.
push *RUNS:
    python scripts/analysis/push.py "$@"

# GRPO steps from each deployed policy, and from the base, until half of the rollouts hack.
relearn *RUNS:
    python scripts/analysis/after.py relearn "$@"

# How well each run's own score told its hacks, and what the completions' length alone would have told.
detect *RUNS:
    python scripts/analysis/after.py detect "$@"

# Likelihood steps on the pairs' clean sides into the deployed block, reported off and on.
heal *RUNS:
    python scripts/analysis/after.py heal "$@"

# Train with any preset and flags, e.g. `just train full --intervention routeV --seed 41`.
train *ARGS:
    python -m vgrout.train "$@"

# One table over runs, grouped by arm: deployed hack, solve and gain (default: all of out/runs).
results *DIRS:
    python scripts/analysis/results.py "$@"

# Curves of runs in one figure and a CSV (default: all of out/runs).
dyn *DIRS:
    python scripts/view/dyn.py "$@"

# Read a run's rollouts in the terminal, e.g. `just show out/runs/demo_routeQ --zone ROUTE --outcome hack`.
show RUN *ARGS:
    python scripts/view/show.py "$@"

# Rebuild the organism from its seed: problems, tokenizer and pretrained base, into data/organism/ (≤ 10 minutes).
organism *ARGS:
    python -m vgrout.organism "$@"

# Measure the ceiling for solve (no_loophole) and commit-ready record docs/results/no_loophole_s<SEED>.json.
ceiling SEED="41":
    rm -rf {{ runs }}/ceiling_s{{ SEED }}
    OMP_NUM_THREADS=1 python -m vgrout.train organism --intervention no_loophole --seed {{ SEED }} --out-dir {{ runs }}/ceiling_s{{ SEED }}
    python scripts/analysis/results.py {{ runs }}/ceiling_s{{ SEED }} --compact docs/results/no_loophole_s{{ SEED }}.json

# Fetch the real problem sets into data/leetcode/.
download-data:
    python scripts/tools/download_data.py

# Fetch the model of the presets fast and full into the local cache of the Hugging Face hub.
download-model MODEL="Qwen/Qwen3-4B":
    hf download {{ MODEL }} --include "*.safetensors" "*.json" "*.txt"

# H: with the quarantine never in the forward, only rank r trains: it hacks like plain GRPO, somewhat later for less capacity.
none *ARGS:
    python -m vgrout.train organism --intervention none "$@"

# H: plain GRPO with both blocks learns the loopholes, names it has never seen included, and solves far less than without them.
none2r *ARGS:
    python -m vgrout.train organism --intervention none2r "$@"

# H: where no loophole pays, the same training raises solve at least 0.25 above the base: there is something to retain.
no_loophole *ARGS:
    python -m vgrout.train organism --intervention no_loophole "$@"

# H: two blocks trained alike share what is learned, so ablating one removes part of the hack without any gate; a gate must do better.
absorb *ARGS:
    python -m vgrout.train organism --intervention absorb "$@"

# H: routing by v_grad leaves less hack in the deployed block than `absorb` does, on modes without pairs too, and retains a gain in solve.
routeV *ARGS:
    python -m vgrout.train organism --intervention routeV "$@"

# H: a quarantine that learned the hack first finds it in what the deployed policy samples; kept out, solving is retained, on every mode.
routeQ *ARGS:
    python -m vgrout.train organism --intervention routeQ "$@"

# H: a deployed block that trains beside a quarantine which has learned the hack learns to resist it, whichever rows they share.
absorbQ *ARGS:
    python -m vgrout.train organism --intervention absorbQ "$@"

# H: beside a random quarantine that changes the policy as much it learns no resistance to the hack, and hacks: the direction counts.
matched_absorbQ *ARGS:
    python -m vgrout.train organism --intervention matched_absorbQ "$@"

# H: beside a random quarantine of the same norm, which is nearly no push at all, it hacks as without a gate.
placebo_absorbQ *ARGS:
    python -m vgrout.train organism --intervention placebo_absorbQ "$@"

# H: pushed away from the hack by the quarantine, the deployed block has nothing to resist, and hacks.
inverted_absorbQ *ARGS:
    python -m vgrout.train organism --intervention inverted_absorbQ "$@"

# H: dropping what routeQ routes does as well where the score misses little; routing must show what it adds.
filterQ *ARGS:
    python -m vgrout.train organism --intervention filterQ "$@"

# H: so does taking the reward of passing from it.
penaltyQ *ARGS:
    python -m vgrout.train organism --intervention penaltyQ "$@"

# H: advantage modification is weaker: it goes by rank within the group, and penalises where nobody hacks.
advmodQ *ARGS:
    python -m vgrout.train organism --intervention advmodQ "$@"

# H: with a random delta in the quarantine's place, at the same share, the hack comes back.
placeboQ *ARGS:
    python -m vgrout.train organism --intervention placeboQ "$@"

# H: a quarantine that is trained first does not help by being there: without a gate the deployed policy finds the hack by itself.
no_gateQ *ARGS:
    python -m vgrout.train organism --intervention no_gateQ "$@"

# H: a Haar-random direction that routes the same share of rows does not do what v_grad does; if it does, the direction is not the cause.
placebo *ARGS:
    python -m vgrout.train organism --intervention placebo "$@"

# H: a live LLM judge with a penalty keeps hacks rare, and costs solve as far as it flags honest work (--judge-url, --judge-model).
penaltyJ *ARGS:
    python -m vgrout.train organism --intervention penaltyJ "$@"

# H: screening by the same judge is weaker than its penalty: what it misses is reinforced by the rest of the group.
filterJ *ARGS:
    python -m vgrout.train organism --intervention filterJ "$@"

# H: a probe with another problem set's labels and a penalty suppresses the modes that its data has, and no others (`just other-environment`).
penaltyP *ARGS:
    python -m vgrout.train organism --intervention penaltyP --act-space residual --probe-data {{ runs }}/other_none2r/rollouts.jsonl.gz "$@"

# H: routing by the probe leaves less hack in the deployed block than `absorb`, at the probe's recall: what labels from elsewhere would buy.
routeP *ARGS:
    python -m vgrout.train organism --intervention routeP --act-space residual --probe-data {{ runs }}/other_none2r/rollouts.jsonl.gz "$@"

# Another problem set for the organism and labelled rollouts on it (none2r), for the probe arms: out/runs/other_none2r.
other-environment *ARGS:
    python scripts/tools/other_problems.py out/other/problems.jsonl.gz
    python scripts/tools/make_teacher.py --problems out/other/problems.jsonl.gz --out out/other/teacher.jsonl.gz
    python -m vgrout.train organism --intervention none2r --data out/other/problems.jsonl.gz --teacher-pool out/other/teacher.jsonl.gz \
        --eval-every 0 --out-dir {{ runs }}/other_none2r "$@"

# Write a run's deployed policy as a standard PEFT LoRA folder with a model card, e.g. `just export out/runs/demo_routeQ --block both`.
export RUN *ARGS:
    python scripts/tools/export.py "$@"

# One self-contained HTML page about runs: curves, tables, score histograms, completions to browse (out/figs/report.html).
report *RUNS:
    python scripts/view/report.py "$@"

# The decision experiment on the organism, resumable: the headline (5 seeds, under 3 hours on two cores); --all (about a day), --only A3, --arms, --seeds, --missing, --dry-run, --rehearse.
decision *ARGS:
    python scripts/experiments/decision.py "$@"

# Tables and figures of the decision from its compact records, into docs/ (A1 to A7 and the verdict).
artifacts *ARGS:
    python scripts/experiments/artifacts.py "$@"

# The paper as out/paper/main.pdf, its tables and figures from `just artifacts`.
paper:
    @command -v pdflatex > /dev/null || { echo "error: LaTeX is missing: apt-get install texlive-latex-recommended texlive-latex-extra texlive-fonts-recommended" >&2; exit 2; }
    @mkdir -p out/paper
    @cd docs/writeup && for pass in 1 2; do pdflatex -interaction=nonstopmode -halt-on-error -output-directory=../../out/paper main.tex > ../../out/paper/build.txt 2>&1 || { tail -20 ../../out/paper/build.txt; exit 1; }; done
    @grep -E "Overfull .hbox|undefined" out/paper/main.log || echo "out/paper/main.pdf"

# Queue the decision run on pueue: routeV, placebo, none, absorb, routeL on Qwen3-4B, three seeds (--dry-run prints the commands).
queue-decision *ARGS:
    python scripts/experiments/queue_decision.py "$@"

# The decision run's list of jobs on a Ray cluster, a GPU a run (needs: uv sync --extra ray).
pool *ARGS:
    python scripts/experiments/pool_ray.py "$@"

# Speed and memory against TRL, arm by arm, and by size (≤ 15 minutes); with --gpu: Qwen3-4B's architecture on one GPU. Writes out/bench.json.
bench *ARGS:
    python scripts/analysis/bench.py "$@"
