"""Rebuild the organism: `python -m vgrout.organism --out data/organism`."""

import tyro

from vgrout.core import run_main
from vgrout.organism.problems import Recipe, main

run_main(main, tyro.cli(Recipe, prog="python -m vgrout.organism"))
