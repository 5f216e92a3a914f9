"""Everything that training refuses on purpose. Each message says what happened, where, and what to do."""


class TrainingError(Exception):
    """Base of every error that `tidemill.tasks.training` raises on purpose."""


class SpecError(TrainingError, ValueError):
    """A setting of the spec that only torch or the data could show to be wrong."""


class FactoryError(TrainingError):
    """The model factory cannot be imported, fails, or does not return a model that can be trained and stored."""


class ColumnError(TrainingError):
    """A column that cannot be used: missing, of another type, wholly null, or holding NaN, infinity or a bad label."""


class OutputShapeError(TrainingError):
    """The model's output does not have the shape that the task needs."""


class NonFiniteLoss(TrainingError):
    """The loss or a weight became NaN or infinite. The learner must be thrown away and loaded again."""


class StateMismatch(TrainingError):
    """Stored weights or training state do not fit the model or the optimizer of the spec."""
