"""What a run writes down, checks and evaluates."""
