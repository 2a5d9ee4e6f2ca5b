"""Writing a SavedModel folder with named signatures; it loads without Keras and without this package."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from typing import TYPE_CHECKING

from .. import artifact
from ..errors import UsageError
from .keras_internals import clean_variable_names
from .resizing import fitted
from .signature import FEATURES, Signature, image_preprocessing, signature_of
from .trace import concrete_function

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

SIGNATURE, BYTES_SIGNATURE, BYTES_INPUT = "serving_default", "serving_bytes", "image_bytes"
MARK = "saved_model.pb"


def write_savedmodel(signature: Signature, path: str | os.PathLike[str]) -> None:
    """Write the folder, unverified. Variables are tracked one by one, so that nothing of Keras is needed to load it."""
    import tensorflow as tf

    module = tf.Module()
    module.weights = [variable.value for variable in tracked_variables(signature.model)]
    module.served = {
        name: concrete_function(view, view.specs(argument_names(view)))[0] for name, view in array_signatures(signature).items()
    }
    if takes_files(signature):
        spec = tf.TensorSpec([None], tf.string, name=BYTES_INPUT)
        module.served[BYTES_SIGNATURE] = concrete_function(functools.partial(_from_bytes, signature), [spec])[0]
    try:
        with clean_variable_names(module.weights):
            tf.saved_model.save(module, str(path), signatures=dict(module.served))
    except tf.errors.OpError as error:
        raise OSError(artifact.first_line(error)) from error  # no number; `publishing` knows whether the disk is full


def tracked_variables(model: keras.Model) -> list[keras.Variable]:
    """Return all variables of a model in a fixed order, the states of recurrent layers included."""
    from keras_resnet.graphs import layers_in, state_variables

    states = [state for layer in layers_in(model) for state in state_variables(layer)]
    return list({id(variable): variable for variable in (*model.variables, *states)}.values())


def argument_names(signature: Signature) -> list[str]:
    """Return the inputs' names as those of Python arguments, which is what a signature's are: `left eye` becomes `left_eye`."""
    names = []
    for spec in signature.inputs:
        name = re.sub(r"\W", "_", spec.name, flags=re.ASCII)
        name = name if name[:1].isalpha() else f"arg_{name}"
        names.append(f"{name}_{names.count(name)}" if name in names else name)
    return names


def array_signatures(signature: Signature) -> dict[str, Signature]:
    """Return `{signature name: Signature}` of those that take arrays: the outputs asked for, and the features of a classifier."""
    found = {SIGNATURE: signature}
    with contextlib.suppress(UsageError):
        features = signature_of(signature.model, outputs=[FEATURES], layout=signature.layout)
        found[FEATURES] = features
    return found


def takes_files(signature: Signature) -> bool:
    """Return whether image files can be served: one image input of fixed size with one or three channels."""
    shape = tuple(signature.model.inputs[0].shape)
    return len(signature.inputs) == 1 and len(shape) == 4 and None not in shape[1:] and shape[3] in (1, 3)


def _from_bytes(signature: Signature, encoded: tf.Tensor) -> dict[str, tf.Tensor]:
    """The outputs from encoded images, decoded, resized and cropped in the graph as the card says."""
    import tensorflow as tf

    height, width, channels = signature.model.inputs[0].shape[1:]
    preprocessing = image_preprocessing(signature.model)

    def decoded(image: tf.Tensor) -> tf.Tensor:
        pixels = tf.io.decode_image(image, channels=channels, expand_animations=False)
        channels_first = tf.transpose(tf.cast(pixels, tf.float32), [2, 0, 1])[None]
        return tf.ensure_shape(fitted(channels_first, preprocessing)[0], (channels, height, width))

    pixels = tf.map_fn(decoded, encoded, fn_output_signature=tf.float32)
    return signature(pixels if signature.layout == "nchw" else tf.transpose(pixels, [0, 2, 3, 1]))
