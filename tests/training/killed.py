"""Train deterministically into a folder: python killed.py FOLDER [STEP].

With STEP it kills itself there; without, it breaks the run several times, ends it, and makes another that is never broken.
"""

import os
import signal
import sys

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import keras

from keras_resnet import training
from tests.training.models import At, network, run


class Broken(Exception):
    pass


def fit(folder, *callbacks):
    growth = ((2, "stage2_*_out", 1),)
    course = {"epochs": 4, "crop_padding": 1, "mixup": 0.3, "ema": 0.9, "seed": 2, "validate": "test", "growth": growth}
    description = run(deterministic=True, save_every=3, **course)
    return training.fit(network(), "digits", run=description, out=folder, callbacks=callbacks, quiet=True)


def breaking(step):
    def act(model):
        raise Broken

    return At(step, act)


if __name__ == "__main__":
    folder = sys.argv[1]
    if len(sys.argv) > 2:
        fit(f"{folder}/killed", At(int(sys.argv[2]), lambda model: os.kill(os.getpid(), signal.SIGKILL)))
    for step in (6, 8, 1, 14):
        # Interrupted by an exception in the middle, at the end of an epoch, at once, and after growth.
        try:
            fit(f"{folder}/killed", breaking(step))
        except Broken:
            continue
    fit(f"{folder}/killed")
    keras.backend.clear_session()
    fit(f"{folder}/whole")
