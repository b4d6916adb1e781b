"""Live monitors, the external baselines."""
