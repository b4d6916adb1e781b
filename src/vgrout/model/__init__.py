"""The policy: model, adapter, log-probs, sampling, update."""
