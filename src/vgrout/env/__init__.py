"""The environment: disclosed flaws, problems, pairs, demonstrations, rollouts."""
