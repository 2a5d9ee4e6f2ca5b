"""The command `resnet-train`: starts the trainer without TensorFlow's messages."""

import os
import sys


def main() -> None:
    """Run `keras_resnet.training.cli` with the arguments of this process."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from .source import quiet_start

    try:
        with quiet_start():
            from keras_resnet.training.cli import main as train
    except KeyboardInterrupt:
        sys.exit(130)
    train(prog_name="resnet-train")
