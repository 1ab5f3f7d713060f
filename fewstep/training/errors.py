"""A run that cannot go on, in one message: what, where, what is kept, what to do."""


class TrainingError(RuntimeError):
    """Training stopped at its work; everything up to the last checkpoint is kept."""


class Interrupted(TrainingError):  # noqa: N818  # it is no error
    """A signal asked the run to end; a checkpoint was written first."""
