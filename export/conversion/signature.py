"""What goes into an artefact and what comes out of it: names, shapes, layout and dtype, decided in one place."""

import contextlib
import difflib
from dataclasses import dataclass, replace

import numpy as np

from ..errors import UsageError
from .rebuild import in_float64
from .resizing import fitted

IMAGES, LOGITS, PROBABILITIES, FEATURES = "images", "logits", "probabilities", "features"
TOP_CLASSES, TOP_PROBABILITIES = "top_classes", "top_probabilities"
LAYOUTS = ("nhwc", "nchw")
INPUT_DTYPES = ("float32", "uint8")


@dataclass(frozen=True)
class Port:
    """An input as the artefact shows it: name, shape (None where open) and dtype."""

    name: str
    shape: tuple
    dtype: str


@dataclass(frozen=True)
class Interface:
    """A Keras model seen through the inputs and outputs of its artefact. Made by `interface`.

    Attributes:
        model: the Keras model.
        inputs: tuple of `Port`, in the artefact's layout and dtype.
        outputs: output names, in order.
        layout: `"nhwc"` or `"nchw"`, of rank-4 inputs.
        runner: the model with its inner tensors of `taps` as further outputs; the model itself without any.
        taps: names of those outputs.
        top: how many classes the top-k outputs hold.
        fit: the card's entry by which the graph resizes and crops its input, or None; see `resizing`.
    """

    model: object
    inputs: tuple
    outputs: tuple
    layout: str
    runner: object
    taps: tuple = ()
    top: int | None = None
    fit: dict | None = None

    def specs(self, names=None):
        """One `tf.TensorSpec` per input; `names` where TensorFlow's are to be seen (it may alter what it does not like)."""
        import tensorflow as tf

        names = names or [f"input_{index}" for index in range(len(self.inputs))]
        return [tf.TensorSpec(port.shape, port.dtype, name=name) for port, name in zip(self.inputs, names, strict=True)]

    def __call__(self, *tensors):
        """`{output name: tensor}` of the model, eagerly or while tracing."""
        found = self._all(tensors)
        return {name: found[name] for name in self.outputs}

    def _all(self, tensors):
        """The outputs that are wanted, and the logits behind probabilities."""
        import keras

        tensors = [self._as_the_model_wants(tensor, port) for tensor, port in zip(tensors, self.inputs, strict=True)]
        if not isinstance(self.model, keras.Sequential) and keras.tree.is_nested(self.model.input):
            tensors = [keras.tree.pack_sequence_as(self.model.input, tensors)]
        names = output_names(self.model)
        activation = final_activation(self.model)
        with without_activation(self.model) if activation else contextlib.nullcontext():
            results = keras.tree.flatten(self.runner(tensors[0], training=False))
        found = dict(zip([*names, *self.taps], results, strict=True))
        if names == [LOGITS]:
            found[PROBABILITIES] = (activation or keras.ops.softmax)(found[LOGITS])
        if self.top:
            found[TOP_PROBABILITIES], found[TOP_CLASSES] = keras.ops.top_k(found[PROBABILITIES], self.top)
        return found

    def _as_the_model_wants(self, tensor, port):
        import tensorflow as tf

        if port.dtype == "uint8":
            tensor = tf.cast(tensor, "float32")
        if self.fit:
            upright = tensor if self.layout == "nchw" else tf.transpose(tensor, [0, 3, 1, 2])
            return tf.transpose(fitted(upright, self.fit), [0, 2, 3, 1])
        return tf.transpose(tensor, [0, 2, 3, 1]) if self.layout == "nchw" and len(port.shape) == 4 else tensor

    def reference(self, feeds):
        """What Keras says, and the size against which an error is measured.

        That is the largest value of an output; for probabilities the largest logit, since a softmax turns an error of its input
        into one of the same size at most.

        Args:
            feeds: `{input name: array}` in the artefact's layout.

        Returns:
            `({output name: array}, {output name: size})`.
        """
        import tensorflow as tf

        found = {
            name: np.asarray(value)
            for name, value in self._all([tf.convert_to_tensor(feeds[p.name]) for p in self.inputs]).items()
        }
        largest = {name: float(np.abs(value).max(initial=0)) for name, value in found.items()}
        for name in (PROBABILITIES, TOP_PROBABILITIES):
            if name in found:
                largest[name] = max(largest[name], largest[LOGITS])
        return {name: found[name] for name in self.outputs}, largest

    def in_float64(self):
        """The same through the model rebuilt in float64; None if it cannot be."""
        try:
            exact = in_float64(self.model)
            _, taps = _chosen(exact, [name for name in self.outputs if name not in (TOP_CLASSES, TOP_PROBABILITIES)])
        except UsageError:
            return None
        return replace(self, model=exact, runner=_with_taps(exact, taps))

    def truth(self, feeds):
        """What a model in float64 computes, as `{output name: array}`."""
        import tensorflow as tf

        tensors = [tf.convert_to_tensor(feeds[port.name]) for port in self.inputs]
        tensors = [tf.cast(tensor, tf.float64) if tensor.dtype.is_floating else tensor for tensor in tensors]
        return {name: np.asarray(value) for name, value in self._all(tensors).items()}


def interface(model, *, outputs=None, layout="nhwc", input_dtype="float32", resize=False, top_k=None):
    """Decide names and shapes of an artefact's inputs and outputs.

    A single input is called `images`. A single output with a final softmax or sigmoid gives `logits` before and
    `probabilities` after it; one without gives `logits`, and `probabilities` by softmax; one of higher rank, or that ends in
    pooling, gives `features`. Several inputs or outputs keep Keras' names. Inner tensors of a one-output model: `features`, what
    goes into its last pooling or Flatten, and `features_LAYER`, what the layer of that name returns.

    Args:
        model: a built Functional or Sequential model.
        outputs: names wanted; by default `logits` (`features`; all of several).
        layout: `"nhwc"` or `"nchw"` of rank-4 inputs.
        input_dtype: `"float32"`, or `"uint8"` for pixels.
        resize: take uint8 images of any size, resized and cropped as the model's card says (stretched to the input without one).
        top_k: adds `top_classes` and `top_probabilities`, the best so many classes of each row, best first.

    Raises:
        UsageError: the model has no static inputs, or a name, layout or dtype is not offered.
    """
    if layout not in LAYOUTS:
        raise UsageError(f"`layout` must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if input_dtype not in INPUT_DTYPES:
        raise UsageError(f"`input_dtype` must be one of {', '.join(INPUT_DTYPES)}, got {input_dtype!r}")
    tensors = input_tensors(model)
    if input_dtype == "uint8" and (len(tensors) != 1 or tensors[0].dtype != "float32"):
        raise UsageError("`input_dtype` uint8 needs a model with one float32 input")
    names = [IMAGES] if len(tensors) == 1 else [tensor.name for tensor in tensors]
    ports = []
    for name, tensor in zip(names, tensors, strict=True):
        shape = tuple(tensor.shape)
        if layout == "nchw" and len(shape) == 4:
            shape = (shape[0], shape[3], shape[1], shape[2])
        ports.append(Port(name, shape, input_dtype if input_dtype == "uint8" else str(tensor.dtype)))
    fit = None
    if resize:
        fit = _fit(model, input_dtype)
        channels = tensors[0].shape[3]
        ports = [replace(ports[0], shape=(None, channels, None, None) if layout == "nchw" else (None, None, None, channels))]
    chosen, taps = _chosen(model, outputs)
    if top_k is not None:
        chosen = (*chosen, *_top_outputs(model, top_k))
    return Interface(model, tuple(ports), chosen, layout, _with_taps(model, taps), tuple(taps), top_k, fit)


def _fit(model, input_dtype):
    if input_dtype != "uint8" or len(model.inputs[0].shape) != 4:
        raise UsageError(
            "`resize` goes with uint8 images; give `input_dtype` uint8 (--input uint8) and a model that takes images"
        )
    found = image_preprocessing(model)
    if not found["size"]:
        raise UsageError(f"`resize` needs a size: neither the input nor the card of model {model.name!r} names one")
    return found


def image_preprocessing(model):
    """How an image becomes the model's input, from its card, with the size of its input filled in."""
    from keras_resnet.modelcard import card, preprocessing_card

    known, shape = card(model), tuple(model.inputs[0].shape)
    found = dict(known.preprocessing) if known else preprocessing_card()
    if not found.get("size") and len(shape) == 4 and None not in shape[1:3]:
        found["size"] = [int(side) for side in shape[1:3]]
    return found


def _with_taps(model, taps):
    """The model with inner tensors as further outputs, itself without any."""
    import keras

    return keras.Model(model.inputs, [model.outputs[0], *taps.values()]) if taps else model


def _top_outputs(model, top_k):
    if output_names(model) != [LOGITS]:
        raise UsageError(f"`top_k` needs a classifier; model {model.name!r} offers {', '.join(output_names(model))}")
    classes = model.outputs[0].shape[-1]
    if not isinstance(top_k, int) or not 1 <= top_k <= classes:
        raise UsageError(f"`top_k` must be from 1 to the model's {classes} classes, got {top_k!r}")
    return TOP_CLASSES, TOP_PROBABILITIES


def input_tensors(model):
    """The model's symbolic inputs.

    Raises:
        UsageError: it has none, being subclassed or not built.
    """
    try:
        tensors = list(model.inputs)
    except (AttributeError, TypeError, ValueError):
        tensors = []
    if not tensors:
        raise UsageError(
            f"model {model.name!r} has no static inputs; build it, or wrap a subclassed one: "
            "keras.Model(x, model(x)) with x = keras.Input(…)"
        )
    return tensors


def _chosen(model, wanted):
    """The names of the outputs, and `{name: symbolic tensor}` of those that are inner tensors."""
    names = output_names(model)
    if len(names) > 1:
        offered = default = names
    else:
        offered = [LOGITS, PROBABILITIES] if names == [LOGITS] else names
        default = offered[:1]
    wanted = default if wanted is None else list(dict.fromkeys(wanted))
    if not wanted:
        raise UsageError(f"`outputs` must name at least one of {', '.join(offered)}")
    taps = {name: _tap(model, name, names, offered) for name in wanted if name not in offered}
    return tuple(wanted), taps


def _tap(model, name, names, offered):
    if len(names) == 1 and name == FEATURES:
        for layer in reversed(model.layers):
            if isinstance(layer, _pooling_layers()):
                return layer.input
    if len(names) == 1 and name.startswith(f"{FEATURES}_"):
        layers = {layer.name: layer for layer in model.layers}
        wanted = name.removeprefix(f"{FEATURES}_")
        if wanted in layers:
            return layers[wanted].output
        near = difflib.get_close_matches(wanted, layers, n=2)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UsageError(f"model {model.name!r} has no layer {wanted!r} for the output {name!r}{hint}")
    inner = f", {FEATURES} and {FEATURES}_LAYER" if len(names) == 1 else ""
    raise UsageError(f"model {model.name!r} offers the outputs {', '.join(offered)}{inner}, not {name!r}")


def output_names(model):
    """Names of all outputs of the model as it is; see `interface` for the rule."""
    import keras

    tensors = list(model.outputs)
    if len(tensors) > 1:
        structure = None if isinstance(model, keras.Sequential) else model.output
        names = sorted(structure) if isinstance(structure, dict) else list(model.output_names)
        if len(names) != len(tensors) or len(set(names)) != len(names):
            names = [f"output_{index}" for index in range(len(tensors))]
        return names
    if len(tensors[0].shape) != 2 or isinstance(final_layer(model), _pooling_layers()):
        return [FEATURES]
    return [LOGITS]


def _pooling_layers():
    from keras import layers

    kinds = ("GlobalAveragePooling", "GlobalMaxPooling")
    return (layers.Flatten, *(getattr(layers, f"{kind}{rank}D") for kind in kinds for rank in (1, 2, 3)))


def final_layer(model):
    """The layer that makes the model's only output, looked up through nested models."""
    import keras

    layer = model.layers[-1] if isinstance(model, keras.Sequential) else model.outputs[0]._keras_history.operation
    return final_layer(layer) if isinstance(layer, keras.Model) and hasattr(layer, "layers") and layer.outputs else layer


def final_activation(model):
    """The softmax or sigmoid that ends a one-output classifier, or None."""
    if len(model.outputs) != 1 or len(model.outputs[0].shape) != 2:
        return None
    return _ending(final_layer(model))[1]


def _ending(layer):
    """Where a layer keeps its final softmax or sigmoid, and which it is: `(attribute, function)`, or `(None, None)`."""
    import keras

    if isinstance(layer, keras.layers.Softmax):
        return ("call", keras.activations.softmax) if layer.axis in (-1, 1) else (None, None)
    activation = getattr(layer, "activation", None)
    final = activation in (keras.activations.softmax, keras.activations.sigmoid)
    return ("activation", activation) if final else (None, None)


@contextlib.contextmanager
def without_activation(model):
    """Let the model return logits while the block runs; its last layer gets its activation back afterwards."""
    layer = final_layer(model)
    attribute, activation = _ending(layer)
    setattr(layer, attribute, _linear)
    try:
        yield
    finally:
        if attribute == "call":
            delattr(layer, attribute)
        else:
            setattr(layer, attribute, activation)


def _linear(x, mask=None):
    return x
