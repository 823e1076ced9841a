"""The error that every reader of weights raises."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, or does not belong to the model."""
