"""Training: configuration, set-up of a run, metrics, log, checkpoints and the launch of several ranks."""
