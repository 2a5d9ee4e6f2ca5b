"""Preprocessing as a layer, so that it is saved with the model and is a part of the exported file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

# Mean and standard deviation of pixels / 255, and whether the network was trained on BGR.
MODES: dict[str, dict[str, Any]] = {
    "none": {},
    "torch": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
    "caffe": {"mean": [123.68 / 255, 116.779 / 255, 103.939 / 255], "std": 1 / 255, "bgr": True},
    "tf": {"mean": 0.5, "std": 0.5},
    "cifar10": {"mean": [0.4914, 0.4822, 0.4465], "std": [0.2470, 0.2435, 0.2616]},
}


@keras.saving.register_keras_serializable("keras_resnet")
class Preprocessing(keras.layers.Layer):
    """Compute `(x / 255 − mean) / std` in float32. Unlike `preprocess_input` it is a layer and does not change its input.

    Args:
        mode: A key of `MODES`: `"none"` (values stay as they are), `"torch"` (ImageNet mean and deviation), `"caffe"`
            (BGR, mean 103.939/116.779/123.68, not scaled), `"tf"` (−1 to 1), `"cifar10"`; or `"custom"` with `mean` and `std`.
        mean: Mean of pixels / 255: a number, or one per channel in RGB order.
        std: Standard deviation of pixels / 255, likewise.
        bgr: Whether the channels are then reversed.
        data_format: `"channels_last"` or `"channels_first"`. Default: Keras' setting.

    Raises:
        ValueError: The mode is unknown, numbers are given with a named mode, or they do not match the channels of the input.

    Source: the modes are those of `keras.applications.imagenet_utils`, torchvision and the usual CIFAR-10 statistics.
    """

    def __init__(
        self,
        mode: str = "none",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        bgr: bool = False,
        data_format: str | None = None,
        **kwargs: Any,
    ) -> None:
        # A mixed policy would round the pixels (by up to 0.5 in bfloat16).
        kwargs["dtype"] = "float32"
        super().__init__(**kwargs)
        if mode == "custom":
            if mean is None or std is None or np.any(np.asarray(std) <= 0):
                raise ValueError(f'mode "custom" needs `mean` and a positive `std` (of pixels / 255), got mean={mean}, std={std}')
            numbers: dict[str, Any] = {"mean": mean, "std": std, "bgr": bgr}
        elif mode not in MODES:
            modes = ", ".join(map(repr, MODES))
            raise ValueError(f"preprocessing must be one of {modes} or a dict of `mean` and `std`, got {mode!r}")
        elif mean is not None or std is not None or bgr:
            raise ValueError(f'`mean`, `std` and `bgr` need mode "custom", got mode {mode!r}')
        else:
            numbers = MODES[mode]
        self.mode, self.mean, self.std, self.bgr = mode, mean, std, bool(bgr)
        self.numbers = numbers
        self.data_format = data_format or keras.config.image_data_format()

    @classmethod
    def of(cls, spec: str | dict[str, Any], **kwargs: Any) -> Preprocessing:
        """Make the layer from the name of a mode, or from a dict of `mean`, `std` and optionally `bgr`."""
        if isinstance(spec, dict):
            numbers = {key: value for key, value in spec.items() if key != "mode"}
            if unknown := set(numbers) - {"mean", "std", "bgr"}:
                raise ValueError(f"preprocessing may hold `mean`, `std` and `bgr`, got {', '.join(sorted(unknown))}")
            return cls(spec.get("mode", "custom"), **numbers, **kwargs)
        return cls(spec, **kwargs)

    def call(self, inputs: keras.KerasTensor) -> keras.KerasTensor:
        x = ops.cast(inputs, "float32")
        if not self.numbers:
            return x
        axis = self._axis(x.shape)
        shape = [1] * len(x.shape)
        channels = x.shape[axis]
        shape[axis] = -1
        mean, std = (self._per_channel(key, channels).reshape(shape) for key in ("mean", "std"))
        x = (x - mean) / std
        return ops.flip(x, axis=axis) if self._reverses(channels) else x

    def _axis(self, shape):
        return len(shape) - 1 if self.data_format == "channels_last" else 1

    def _reverses(self, channels):
        return self.numbers.get("bgr", False) and channels > 1

    def _per_channel(self, key, channels):
        """The mean or deviation in pixels, one or one per channel. A grey image gets the mean over the colours."""
        values = np.atleast_1d(np.asarray(self.numbers[key], "float64")) * 255
        if channels == 1:
            values = values.mean(keepdims=True)
        if len(values) not in (1, channels):
            raise ValueError(
                f"preprocessing {self.mode!r} has {len(values)} values of `{key}`, the input has {channels} channels; "
                "give `preprocessing={'mean': …, 'std': …}` with one number or one per channel"
            )
        return values.astype("float32")

    def compute_output_spec(self, inputs: keras.KerasTensor) -> keras.KerasTensor:
        if self.numbers:
            for key in ("mean", "std"):
                self._per_channel(key, inputs.shape[self._axis(inputs.shape)])
        return keras.KerasTensor(inputs.shape, dtype="float32")

    def get_config(self) -> dict[str, Any]:
        numbers = {"mean": self.mean, "std": self.std, "bgr": self.bgr}
        return {**super().get_config(), "mode": self.mode, **numbers, "data_format": self.data_format}

    def describe(self) -> dict[str, Any]:
        """Return what a card stores about the layer: its `mode`, and the numbers of a custom one."""
        if self.mode != "custom":
            return {"mode": self.mode}
        return {"mode": "custom", "mean": self.mean, "std": self.std, "bgr": self.bgr}
