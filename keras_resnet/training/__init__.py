"""What goes along with an optimiser: callbacks, parameter groups. Imported on demand, since it may need TensorFlow."""

from .drift_logger import DriftLogger, drift_figure

__all__ = ["DriftLogger", "drift_figure"]
