"""The fixed first convolution of a network, whose filters whiten patches of training images."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from ..modelcard import card

# Name of the layer.
WHITENED = "stem_conv"
CHUNK = 250


def has_whitening_stem(model: keras.Model) -> bool:
    """Return whether a model of the zoo has a whitening stem."""
    known = card(model)
    return bool(known and known.config and known.config.get("stem_whitening"))


def whiten_stem(model: keras.Model, images: np.ndarray, *, epsilon: float = 5e-4) -> None:
    """Fill the whitening stem of a model, in place, from training images.

    Half of the filters are the principal components of the patches that the convolution sees, strongest first, each divided by
    its standard deviation; the other half are their negatives. What comes out is uncorrelated and of variance 1.

    Args:
        model: Model of the zoo with `stem_whitening`, e.g. `cifar_speed`.
        images: Training images as the model takes them (pixels 0–255). 5,000 are enough.
        epsilon: Number that is added to the variances, so that weak components, which are noise, are not blown up.

    Raises:
        ValueError: The model has no whitening stem.

    Example:
        >>> model = keras_resnet.create_model("cifar_speed")
        >>> keras_resnet.whiten_stem(model, x_train[:5000])

    Source: Jordan (arXiv 2404.00498), section 3.2, after Page's "How to train your ResNet" (2018).
    """
    if not has_whitening_stem(model):
        raise ValueError(f"{model.name!r} has no whitening stem; variants with `stem_whitening` in their config have one")
    layer = model.get_layer(WHITENED)
    before = keras.Model(model.inputs[0], layer.input)
    *sides, channels, filters = layer.kernel.shape
    covariance, count = np.zeros((channels * np.prod(sides),) * 2), 0
    for start in range(0, len(images), CHUNK):
        x = ops.convert_to_numpy(ops.cast(before(images[start : start + CHUNK]), "float32"))
        x = x if layer.data_format == "channels_last" else np.moveaxis(x, 1, -1)
        windows = np.lib.stride_tricks.sliding_window_view(x, sides, axis=tuple(range(1, x.ndim - 1)))
        # A patch as the kernel has it: its sides, then the channels.
        patches = np.moveaxis(windows, x.ndim - 1, -1).reshape(-1, len(covariance)).astype("float64")
        covariance += patches.T @ patches
        count += len(patches)
    variances, components = np.linalg.eigh(covariance / count)
    strongest = (components / np.sqrt(np.maximum(variances, 0) + epsilon))[:, ::-1][:, : filters // 2]
    layer.kernel.assign(np.concatenate([strongest, -strongest], axis=1).reshape(layer.kernel.shape))
