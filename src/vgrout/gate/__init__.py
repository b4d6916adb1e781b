"""Scores and zones: which block a rollout trains."""
