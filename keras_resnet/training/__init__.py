"""Everything with an optimiser: recipes, strategies, `fit`, parameter groups, schedules, callbacks. Needs TensorFlow.

Imported on demand (`import keras_resnet.training`), since `keras_resnet` itself needs Keras alone.
"""

from .drift_logger import DriftLogger, drift_figure
from .faults import Diverged, Interrupted, WorkerLost
from .fitting import fit
from .groups import Group, parameter_groups
from .loop import Result
from .optimizers import SGD, AdamW, Lamb
from .recipes import RECIPES
from .run import Run, TrainingError
from .schedules import WarmUp
from .strategies import DeviceError, Placement, place
from .zoo import train

__all__ = [
    "RECIPES",
    "SGD",
    "AdamW",
    "DeviceError",
    "Diverged",
    "DriftLogger",
    "Group",
    "Interrupted",
    "Lamb",
    "Placement",
    "Result",
    "Run",
    "TrainingError",
    "WarmUp",
    "WorkerLost",
    "drift_figure",
    "fit",
    "parameter_groups",
    "place",
    "train",
]
