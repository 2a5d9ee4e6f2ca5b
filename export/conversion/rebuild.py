"""Copies of Keras models that cannot be exported as they are: in float32, or with dynamic size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..artifact import first_line
from ..errors import UsageError
from .keras_internals import calls_of_layers, equalization_of_an_input, names_from_the_start

if TYPE_CHECKING:
    import keras


def in_float32(model: keras.Model) -> tuple[keras.Model, str | None]:
    """Return the model under the float32 policy, itself if it has it already; weights are copied by position.

    A mixed model's graph would hold casts around every layer, unfolded batch norms and half-precision errors; a float64 model's
    runs in few runtimes.

    Returns:
        `(model, note)`; the note is None if nothing was done.

    Raises:
        UsageError: The model cannot be rebuilt from its config.
    """
    from keras_resnet.graphs import layers_in

    policies = sorted({layer.dtype_policy.name for layer in layers_in(model) if _reduced(layer.dtype_policy)})
    if not policies:
        return model, None
    return _rebuilt(model, "float32", _with_float32), f"rebuilt in float32 (the model uses {', '.join(policies)})"


OTHER_FLOATS = ("float16", "float64")  # bfloat16 among them


def _reduced(policy):
    return _is_other_float(f"{policy.name} {policy.compute_dtype}")


def _is_other_float(name):
    return any(dtype in str(name) for dtype in OTHER_FLOATS)


def _with_float32(node):
    if node.get("class_name") == "DTypePolicy" and _is_other_float(node["config"].get("name")):
        return {**node, "config": {**node["config"], "name": "float32"}}
    return {
        key: "float32" if key == "dtype" and isinstance(value, str) and _is_other_float(value) else value
        for key, value in node.items()
    }


def in_float64(model: keras.Model) -> keras.Model:
    """Return the model under the float64 policy, for reference; layers that are pinned to float32 by their class stay so.

    Raises:
        UsageError: The model cannot be rebuilt from its config.
    """
    return _rebuilt(model, "float64", _with_float64)


def copied(model: keras.Model) -> keras.Model:
    """Return another model that computes the same.

    Raises:
        UsageError: The model cannot be rebuilt from its config.
    """
    return _rebuilt(model, "float32", dict)


def _with_float64(node):
    if node.get("class_name") == "DTypePolicy":
        return {**node, "config": {**node["config"], "name": "float64"}}
    return {key: "float64" if key == "dtype" and value == "float32" else value for key, value in node.items()}


def with_dynamic_size(model: keras.Model) -> keras.Model:
    """Give a model dynamic height and width; a model that has them is returned as it is.

    Raises:
        UsageError: The model has no image input, or needs a fixed size (a Flatten in front of a Dense).
    """
    shapes = [tuple(tensor.shape) for tensor in model.inputs]
    if len(shapes) != 1 or len(shapes[0]) != 4:
        raise UsageError("`dynamic_size` needs a model with one image input")
    if shapes[0][1] is None and shapes[0][2] is None:
        return model
    try:
        with names_from_the_start(), calls_of_layers(lambda path, result: None):
            opened = _opened(model)
            opened.set_weights(model.get_weights())
            _call_at_another_size(opened, *(side or 32 for side in shapes[0][1:3]))
    except Exception as error:
        where = f"layer {error.layer_path!r} of " if hasattr(error, "layer_path") else ""
        raise UsageError(f"{where}model {model.name!r} needs a fixed image size: {first_line(error)}") from error
    return opened


def _call_at_another_size(model, height, width):
    """Call a model once; networks that halve a map and double it again take only some sizes, among them twice their own."""
    import numpy as np

    sizes = [(2 * height + 1, 2 * width + 1), (2 * height, 2 * width), (64, 96), (3 * height, 3 * width)]
    for last, size in enumerate(sizes, 1 - len(sizes)):
        try:
            return model(np.zeros((1, *size, model.inputs[0].shape[3]), model.inputs[0].dtype), training=False)
        except Exception:
            if not last:
                raise


def _opened(model):
    import keras

    def clone(layer: keras.Layer) -> keras.Layer:
        inner = isinstance(layer, keras.Model) and len(layer.inputs) == 1 and len(layer.inputs[0].shape) == 4
        return _opened(layer) if inner else _again(layer)

    tensor = model.inputs[0]
    entry = keras.Input((None, None, tensor.shape[3]), dtype=tensor.dtype, name=tensor.name)
    return keras.models.clone_model(model, input_tensors=entry, clone_function=clone)


def without_identity_blocks(model: keras.Model, tolerance: float = 0.0) -> tuple[keras.Model, str]:
    """Return the model without the residual blocks whose gate is at most `tolerance`, and a note that says how many that were.

    Raises:
        UsageError: The tolerance is negative.
    """
    import keras_resnet as kr

    if tolerance < 0:
        raise UsageError(f"`prune_identity` must not be negative, got {tolerance}")
    small, report = kr.prune(model, tolerance=tolerance)
    return small, f"identity blocks left out: {report}"


def _rebuilt(model, policy, change):
    """The model from its config with `change` applied to every dict in it, under a policy for layers that it does not list."""
    import keras

    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        try:
            with names_from_the_start(), equalization_of_an_input():
                rebuilt = _from_config(model, change)
        except Exception:  # a layer that cannot be made from its config
            with names_from_the_start(), equalization_of_an_input():
                rebuilt = _layer_by_layer(model, policy, change)
        rebuilt.set_weights(model.get_weights())
    except Exception as error:
        raise UsageError(f"model {model.name!r} cannot be rebuilt in another precision: {first_line(error)}") from error
    finally:
        keras.config.set_dtype_policy(before)
    return rebuilt


def _from_config(model, change):
    import keras

    from keras_resnet.graphs import layers_in

    config = {**_mapped(keras.saving.serialize_keras_object(model), change), "compile_config": None}
    return keras.saving.deserialize_keras_object(config, custom_objects=_own_objects(*layers_in(model)), safe_mode=False)


def _own_objects(*layers):
    """The classes of layers and the functions that they hold, by name: `Dense(activation=tf.nn.softmax)` is saved as a name.

    Raises:
        ValueError: A name stands for another object as well, here or in Keras, so that it would not bring the right one back.
    """
    found = {type(layer).__name__: type(layer) for layer in layers}
    # Keras wraps some methods of every layer, `build` for one, and keeps the wrapper in the layer itself.
    held = (value for layer in layers for name, value in vars(layer).items() if not hasattr(type(layer), name))
    for value in held:
        if callable(value) and hasattr(value, "__name__"):
            if found.setdefault(value.__name__, value) is not value or _hides_one_of_keras(value):
                raise ValueError(f"{value.__name__!r} is the name of several functions")
    return found


def _hides_one_of_keras(function):
    """Whether a user's function has the name of an activation of Keras, which Keras would take instead."""
    import keras

    if (function.__module__ or "").partition(".")[0] in ("keras", "tensorflow"):
        return False
    try:
        return keras.activations.get(function.__name__) is not function
    except ValueError:
        return False


def _layer_by_layer(model, policy, change):
    import keras

    def clone(layer: keras.Layer) -> keras.Layer:
        inner = isinstance(layer, keras.Model) and layer.inputs
        return _layer_by_layer(layer, policy, change) if inner else _again(layer, policy, change)

    return keras.models.clone_model(model, clone_function=clone)


def _again(layer, policy=None, change=dict):
    """A new layer with the changed config of another, or a copy where that cannot be, as of a Lambda or without `get_config`."""
    import keras

    from keras_resnet.graphs import layers_in

    try:
        with keras.saving.custom_object_scope(_own_objects(*layers_in(layer))):
            return type(layer).from_config(_mapped(layer.get_config(), change))
    except Exception:
        return _copied(layer, policy, {})


def _copied(value, policy, copies):
    """A layer with all that it holds, its variables and inner layers in another precision; without a policy it shares them.

    Python's own copies go through the config.
    """
    import keras

    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, keras.Layer):
        copied = copies[id(value)] = object.__new__(type(value))
        shared = {} if policy else dict(vars(value))
        vars(copied).update(shared, _inbound_nodes=[], _outbound_nodes=[])
        for name, part in () if shared else vars(value).items():
            vars(copied).setdefault(name, _copied(part, policy, copies))
        return copied
    if isinstance(value, keras.Variable) and value.dtype.startswith(("float", "bfloat")):
        copies[id(value)] = keras.Variable(value, dtype=policy, name=value.name, trainable=value.trainable)
        return copies[id(value)]
    if isinstance(value, keras.DTypePolicy):
        return keras.DTypePolicy(policy)
    if isinstance(value, list | tuple | dict) and any(_holds_state(part) for part in keras.tree.flatten(value)):
        return keras.tree.map_structure(lambda part: _copied(part, policy, copies), value)
    return value


def _holds_state(value):
    import keras

    return isinstance(value, keras.Layer | keras.Variable)


def _mapped(node, change):
    if isinstance(node, dict):
        return {key: _mapped(value, change) for key, value in change(node).items()}
    if isinstance(node, list | tuple):
        return type(node)(_mapped(value, change) for value in node)
    return node
