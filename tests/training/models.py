"""Small networks and runs that training tests share."""

import keras

import keras_resnet as kr
from keras_resnet import training


def network(name="small", seed=5, channels=1):
    """A residual network of depth 8 for 8×8 digits."""
    keras.utils.set_random_seed(seed)
    config = kr.ResNetConfig.cifar(8, channels=channels, input_size=8)
    return kr.create_model(config, input_shape=(8, 8, channels), preprocessing={"mean": 0.3, "std": 0.38}, name=name)


def run(**changes):
    """A short run on digits: 11 steps per epoch."""
    defaults = {"batch_size": 128, "base_batch": 128, "epochs": 2, "learning_rate": 0.1, "nesterov": True, "validate": "none"}
    return training.Run.of(**{**defaults, **changes})


class At(keras.callbacks.Callback):
    """Does something once, after a given step of the run."""

    def __init__(self, step, action):
        super().__init__()
        self.step, self.action, self.count = step, action, 0

    def on_train_batch_end(self, batch, logs=None):
        self.count += 1
        if self.count == self.step:
            self.action(self.model)


class Losses(keras.callbacks.Callback):
    """The running mean of the loss after every step."""

    def __init__(self):
        super().__init__()
        self.values = []

    def on_train_batch_end(self, batch, logs=None):
        self.values.append(float(logs["loss"]))
