"""Images for training, as `tf.data` pipelines that are a pure function of (seed, epoch, image). Needs TensorFlow."""

from .augment import Augmentation
from .pipeline import evaluation_batches, training_batches
from .sources import Source, load
from .splits import Encoded, Images, Records, hold_out
from .tfrecord import write_tfrecords

__all__ = [
    "Augmentation",
    "Encoded",
    "Images",
    "Records",
    "Source",
    "evaluation_batches",
    "hold_out",
    "load",
    "training_batches",
    "write_tfrecords",
]
