"""Scores, gates, controls and actions: which block a rollout trains.

The scores of these modules are known by name to --score and to ARMS.
"""

from vgrout.gate import ratio as ratio
from vgrout.gate import v_grad as v_grad
from vgrout.gate.monitors import scores as scores
