"""The loss of log-probs: what users call, its autograd Function, and both implementations."""
