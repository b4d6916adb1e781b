"""The embedded model organism and its recipe."""
