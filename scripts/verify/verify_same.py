"""Two arms compute what data/records/same.json holds: metrics of every step, and the final adapter.

    python scripts/verify/verify_same.py [--record]     (--record: write it anew, for this machine)

Where the machine's kind of CPU and its torch are those of the record, to the last bit. Elsewhere
sums are taken in another order: the first step's metrics, to a thousandth.
"""

import copy
import json
import math
import sys
import tempfile
from pathlib import Path

import torch
from scripts.verify.loop import run, untimed
from scripts.verify.tiny import read_models_once

from vgrout.config import ModelConfig
from vgrout.files import dumps, sha256_file, write_atomic
from vgrout.run.records import load_metrics

PATH = Path(__file__).resolve().parents[2] / "data" / "records" / "same.json"
LINES = ("routeV --refresh-every 2", "absorbQ --quarantine-first 1")
RELATIVE = 1e-3
Computed = dict[str, dict]


def computed() -> Computed:
    """Line → metrics and hash of a short run of the organism."""
    found = {}
    with tempfile.TemporaryDirectory() as tmp:
        for i, line in enumerate(LINES):
            every_layer = f"{line} --targets {ModelConfig.targets}"
            folder = run(f"{tmp}/{i}", every_layer, preset="organism")
            adapter = sha256_file(folder / "adapter.safetensors")
            found[line] = {"metrics": untimed(load_metrics(folder)), "adapter": adapter}
    return json.loads(dumps(found))


def unlike(now: Computed, then: Computed) -> list[str]:
    """The figures of the first steps that are not within RELATIVE of each other."""
    found = []
    for line in then:
        one, two = (both[line]["metrics"][0] for both in (now, then))
        for key in one.keys() | two.keys():
            a, b = (row.get(key) for row in (one, two))
            near = None not in (a, b) and math.isclose(a, b, rel_tol=RELATIVE, abs_tol=1e-6)
            found += [] if near or a == b else [f"{line}: {key} is {a}, was {b}"]
    return found


def check(now: Computed, recorded: dict[str, Computed]) -> None:
    then = recorded.get(machine())
    if then is None:
        other, then = next(iter(recorded.items()))
        assert not unlike(now, then), "\n".join(unlike(now, then))
        print(f"ok  first steps within {RELATIVE:g} of those recorded on {other};", end=" ")
        print(f"bits are compared there alone, not on {machine()}")
    else:
        assert now == then, "\n".join(unlike(now, then)) or "the bits of later steps differ"
        print(f"ok  {' and '.join(LINES)}: bit for bit as recorded on {machine()}")
    changed = copy.deepcopy(then)
    row = changed[LINES[0]]["metrics"][0]
    row["loss"] = math.nextafter(row["loss"], math.inf)
    assert changed != then and not unlike(changed, then), "a changed bit goes unnoticed"
    row["loss"] *= 1 + 2 * RELATIVE
    assert unlike(changed, then), "a change of two thousandths goes unnoticed"


def machine() -> str:
    return f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    read_models_once()
    now = computed()
    if "--record" in sys.argv:
        PATH.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(PATH, (json.dumps({machine(): now}, indent=1) + "\n").encode())
        print(f"wrote {PATH.name} for {machine()}")
    check(now, json.loads(PATH.read_text()))
