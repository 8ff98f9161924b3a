"""Errors of the networks."""


class ModelError(ValueError):
    """A network that cannot be built or loaded."""
