"""A run that cannot go on, in one message: what, where, what is kept, what to do."""


class TrainingError(RuntimeError):
    """Training stopped at its work; everything up to the last checkpoint is kept."""


class Diverged(TrainingError):  # noqa: N818  # reads as what it is
    """Numbers of the run ended it: one that is not finite, or an alarm. The same command would end in the same way."""


class Interrupted(TrainingError):  # noqa: N818  # it is no error
    """A signal asked the run to end; a checkpoint was written first."""
