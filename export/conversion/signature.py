"""What goes into an exported file and what comes out of it: names, shapes, layout, dtype and kind, decided in one place."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..options import KINDS
from .resizing import fitted

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

    from keras_resnet.graphs import OutputHead
    from keras_resnet.modelcard import ModelCard

IMAGES, LOGITS, PROBABILITIES, FEATURES, OUTPUT = "images", "logits", "probabilities", "features", "output"
TOP_CLASSES, TOP_PROBABILITIES = "top_classes", "top_probabilities"
LAYOUTS = ("nhwc", "nchw")
INPUT_DTYPES = ("float32", "uint8")


@dataclass(frozen=True)
class InputSpec:
    """An input as the file shows it: name, shape (None where dynamic) and dtype."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str


@dataclass(frozen=True)
class OutputSpec:
    """An output as the file shows it.

    Attributes:
        name: Name in the file.
        kind: What its numbers mean, one of `options.KINDS`.
        source: Where they come from: `"model"` (an output of the model itself), `"layer"` (a tensor inside the model), `"logits"`
            (what goes into the model's final activation), `"softmax"` (a softmax of the model's own logits), `"top_classes"` or
            `"top_probabilities"`.
        index: Position among the model's outputs, or among `Signature.taps` for `"layer"`.
        activation: The model's final activation, `"softmax"` or `"sigmoid"`, where `source` is `"logits"`.
        ranked: Of top-k outputs: the kind of the model's output that they rank.
    """

    name: str
    kind: str
    source: str = "model"
    index: int = 0
    activation: str | None = None
    ranked: str | None = None


@dataclass(frozen=True)
class Signature:
    """A Keras model seen through the inputs and outputs of its file. Made by `signature_of`.

    Calling it on one tensor per input returns `{output name: tensor}`. The model is called as it is, in inference mode.

    Attributes:
        model: The Keras model.
        inputs: In the file's layout and dtype.
        outputs: In the file's order.
        layout: `"nhwc"` or `"nchw"`, of rank-4 inputs.
        runner: The model, with the tensors that `"layer"` outputs ask for as further outputs.
        top: How many classes the top-k outputs hold.
        fit: The card's entry that says how the graph resizes and crops its input, or None; see `resizing`.
    """

    model: keras.Model
    inputs: tuple[InputSpec, ...]
    outputs: tuple[OutputSpec, ...]
    layout: str
    runner: keras.Model
    top: int | None = None
    fit: dict | None = None

    @property
    def names(self) -> list[str]:
        """The output names, in order."""
        return [output.name for output in self.outputs]

    def kinds(self) -> dict[str, str]:
        """Return `{output name: kind}`, for the metadata."""
        return {output.name: output.kind for output in self.outputs}

    def specs(self, names: Iterable[str] | None = None) -> list[tf.TensorSpec]:
        """Return a `tf.TensorSpec` per input, with `names` for TensorFlow to use (it may alter names that it refuses)."""
        import tensorflow as tf

        names = names or [f"input_{index}" for index in range(len(self.inputs))]
        return [tf.TensorSpec(spec.shape, spec.dtype, name=name) for spec, name in zip(self.inputs, names, strict=True)]

    def __call__(self, *tensors: tf.Tensor) -> dict[str, tf.Tensor]:
        """All outputs; only while TensorFlow traces a graph, in which `"logits"` outputs are looked up."""
        import keras

        own, inner = self.run(*tensors)
        found = {}
        for output in self.outputs:
            if output.source == "model":
                found[output.name] = own[output.index]
            elif output.source == "layer":
                found[output.name] = inner[output.index]
            elif output.source == "logits":
                found[output.name] = before_activation(own[output.index], output.activation)
            elif output.source == "softmax":
                found[output.name] = keras.ops.softmax(own[output.index])
            else:
                scores = own[0] if output.ranked == "probabilities" else keras.ops.softmax(own[0])
                values, classes = keras.ops.top_k(scores, self.top)
                found[output.name] = classes if output.source == "top_classes" else values
        return found

    def run(self, *tensors: tf.Tensor) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
        """Return the model's own outputs and the inner tensors asked for, eagerly or while tracing."""
        import keras

        tensors = [self.as_model_input(tensor, spec) for tensor, spec in zip(tensors, self.inputs, strict=True)]
        results = keras.tree.flatten(call_in_inference(self.runner, tensors))
        count = len(self.model.outputs)
        return results[:count], results[count:]

    def model_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that the model sees of an input of that shape in the file."""
        if self.fit:
            return (shape[0], *self.fit["size"], shape[1] if self.layout == "nchw" else shape[3])
        return (shape[0], shape[2], shape[3], shape[1]) if self.layout == "nchw" and len(shape) == 4 else tuple(shape)

    def as_model_input(self, tensor: tf.Tensor, spec: InputSpec) -> tf.Tensor:
        """Return a tensor of the file's input in the layout, dtype and size that the model takes."""
        import tensorflow as tf

        if spec.dtype == "uint8":
            tensor = tf.cast(tensor, "float32")
        if self.fit:
            channels_first = tensor if self.layout == "nchw" else tf.transpose(tensor, [0, 3, 1, 2])
            return tf.transpose(fitted(channels_first, self.fit), [0, 2, 3, 1])
        return tf.transpose(tensor, [0, 2, 3, 1]) if self.layout == "nchw" and len(spec.shape) == 4 else tensor

    def of(self, model: keras.Model) -> Signature:
        """Return the same signature on a copy of the model: in another precision, say.

        Raises:
            UsageError: The copy has other layers.
        """
        wanted = [output.name for output in self.outputs if output.source == "layer"]
        return replace(self, model=model, runner=_with_taps(model, {name: _tap(model, name) for name in wanted}))


def call_in_inference(model: keras.Model, tensors: list) -> object:
    """Call a model on a flat list of tensors, whatever the structure of its inputs."""
    import keras

    nested = not isinstance(model, keras.Sequential) and keras.tree.is_nested(model.input)
    return model(keras.tree.pack_sequence_as(model.input, tensors) if nested else tensors[0], training=False)


PASSED_THROUGH = ("Identity", "Reshape", "Squeeze", "ExpandDims", "StopGradient", "EnsureShape")


def before_activation(tensor: tf.Tensor, activation: str) -> tf.Tensor:
    """Return the tensor that a final softmax or sigmoid is applied to, looked up in the TensorFlow graph being traced.

    Args:
        tensor: An output of the model.
        activation: `"softmax"` or `"sigmoid"`.

    Raises:
        UsageError: The graph does not show it unambiguously.
    """
    import tensorflow as tf

    operation = tensor.op
    while operation.type in PASSED_THROUGH:
        operation = operation.inputs[0].op
    if operation.type != activation.capitalize():
        raise UsageError(
            f"the graph does not show the output `{LOGITS}`: the model ends in {operation.type}, not in a plain "
            f"{activation}; leave `{LOGITS}` out of `outputs`, or end the model without its activation"
        )
    logits = operation.inputs[0]
    return logits if logits.shape.rank == tensor.shape.rank else tf.reshape(logits, tf.shape(tensor))


def signature_of(
    model: keras.Model,
    *,
    outputs: Iterable[str] | None = None,
    layout: str = "nhwc",
    input_dtype: str = "float32",
    resize: bool = False,
    top_k: int | None = None,
    output_kind: str | dict[str, str] | None = None,
    labels: list[str] | None = None,
    old_names: bool = False,
) -> Signature:
    """Decide the names and shapes of a file's inputs, and the names and kinds of its outputs.

    A single input is called `images`, several keep Keras' names; one that is named like an output gets `_input` appended. The
    outputs are the model's own: of a zoo classifier `logits`, of another model with one output `probabilities` where it ends in a
    softmax or sigmoid over the last axis, else `output` (`features` for a zoo model without top); several outputs keep Keras'
    names, outputs in a dict their keys.

    Args:
        model: A built Functional or Sequential model.
        outputs: Names wanted; by default the model's own outputs. A model with one output also offers `logits` (what goes into
            its final activation), `probabilities` (a softmax of its logits), `features` (what goes into its last global pooling
            or Flatten) and `features_LAYER` (what the layer of that name returns).
        layout: `"nhwc"` or `"nchw"` of rank-4 inputs.
        input_dtype: `"float32"`, or `"uint8"` for pixels.
        resize: Take uint8 images of any size, resized and cropped as the model's card says (stretched to the input without one).
        top_k: Add `top_classes` and `top_probabilities`, that many best classes of each row, best first.
        output_kind: One of `options.KINDS` for the only output, or `{output name: kind}`; see there. By default it is read from
            the model's graph. A linear output is `logits` if the model's card or labels say that it scores classes.
        labels: Class names, which make a linear output with as many units `logits`.
        old_names: Name the model's only output as version 0.1 did, to verify a file of that version.

    Raises:
        UsageError: The model has no static inputs, or a name, layout, dtype or kind is not offered.
    """
    _check_choice("layout", layout, LAYOUTS)
    _check_choice("input_dtype", input_dtype, INPUT_DTYPES)
    inputs, fit = _inputs(model, layout, input_dtype, resize)
    own = _own_outputs(model, output_kind, labels, old_names)
    chosen = _chosen(model, own, outputs)
    taps = {name: _tap(model, name) for name, spec in chosen.items() if spec.source == "layer"}
    chosen = {name: replace(spec, index=list(taps).index(name)) if name in taps else spec for name, spec in chosen.items()}
    if top_k is not None:
        chosen |= _top_outputs(model, own, top_k)
    inputs = _apart(inputs, set(chosen))
    return Signature(model, inputs, tuple(chosen.values()), layout, _with_taps(model, taps), top_k, fit)


def _check_choice(name: str, value: object, choices: tuple) -> None:
    if value not in choices:
        raise UsageError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}")


# ---------------------------------------------------------------- inputs


def input_tensors(model: keras.Model) -> list[keras.KerasTensor]:
    """Return the model's symbolic inputs.

    Raises:
        UsageError: It has none, because it is subclassed or not built.
    """
    try:
        tensors = list(model.inputs)
        list(model.outputs)
    except (AttributeError, ValueError, TypeError):
        tensors = []
    if not tensors:
        raise UsageError(
            f"model {model.name!r} has no static inputs; build it, or wrap a subclassed one: "
            "keras.Model(x, model(x)) with x = keras.Input(…)"
        )
    return tensors


def _inputs(model: keras.Model, layout: str, input_dtype: str, resize: bool) -> tuple[tuple[InputSpec, ...], dict | None]:
    """The inputs, and the card's entry on resizing if the graph resizes."""
    tensors = input_tensors(model)
    if input_dtype == "uint8" and (len(tensors) != 1 or tensors[0].dtype != "float32"):
        raise UsageError("`input_dtype` uint8 needs a model with one float32 input")
    names = [IMAGES] if len(tensors) == 1 else [tensor.name for tensor in tensors]
    specs = []
    for name, tensor in zip(names, tensors, strict=True):
        shape = tuple(tensor.shape)
        if layout == "nchw" and len(shape) == 4:
            shape = (shape[0], shape[3], shape[1], shape[2])
        specs.append(InputSpec(name, shape, input_dtype if input_dtype == "uint8" else str(tensor.dtype)))
    if not resize:
        return tuple(specs), None
    fit, channels = _fit(model, input_dtype), tensors[0].shape[3]
    shape = (None, channels, None, None) if layout == "nchw" else (None, None, None, channels)
    return (replace(specs[0], shape=shape),), fit


def _apart(inputs: tuple[InputSpec, ...], outputs: set[str]) -> tuple[InputSpec, ...]:
    """The inputs with names that no output has, since each tensor of an ONNX graph has a name of its own."""
    names = [spec.name for spec in inputs]
    for index in range(len(names)):
        while names[index] in {*outputs, *names[:index], *names[index + 1 :]}:
            names[index] += "_input"
    return tuple(replace(spec, name=name) for spec, name in zip(inputs, names, strict=True))


def _fit(model: keras.Model, input_dtype: str) -> dict:
    if input_dtype != "uint8" or len(model.inputs[0].shape) != 4:
        raise UsageError("`resize` needs uint8 images; set `input_dtype` to uint8 (--input uint8) and a model that takes images")
    found = image_preprocessing(model)
    if not found["size"]:
        raise UsageError(f"`resize` needs a size: neither the input nor the card of model {model.name!r} names one")
    return found


def image_preprocessing(model: keras.Model) -> dict:
    """Return how an image becomes the model's input, from its card, with the size of its input filled in."""
    from keras_resnet.modelcard import card, preprocessing_card

    known, shape = card(model), tuple(model.inputs[0].shape)
    found = dict(known.preprocessing) if known else preprocessing_card()
    if not found.get("size") and len(shape) == 4 and None not in shape[1:3]:
        found["size"] = [int(side) for side in shape[1:3]]
    return found


# ---------------------------------------------------------------- outputs


def _own_outputs(
    model: keras.Model, output_kind: str | dict[str, str] | None, labels: list[str] | None, old_names: bool
) -> dict[str, OutputSpec]:
    """`{name: OutputSpec}` of the model's own outputs, in order."""
    from keras_resnet.graphs import output_heads
    from keras_resnet.modelcard import card

    heads, known = output_heads(model), card(model)
    if len(model.outputs) > 1:
        names = output_names(model)
    else:
        names = [_old_name(model) if old_names else _name(model, heads[0], known)]
    kinds = [head.kind for head in heads]
    if kinds == ["other"] and (_scores_classes(model, known, labels) or old_names and names == [LOGITS]):
        kinds = ["logits"]
    declared = {names[0]: output_kind} if isinstance(output_kind, str) else dict(output_kind or {})
    if isinstance(output_kind, str) and len(names) > 1:
        raise UsageError(f"model {model.name!r} has several outputs; say which one is meant, as in {names[0]}={output_kind}")
    for name, kind in declared.items():
        if name not in names:
            raise UsageError(f"model {model.name!r} has the outputs {', '.join(names)}, not {name!r}")
        _check_choice("output_kind", kind, KINDS)
    return {
        name: OutputSpec(name, declared.get(name, kind), "model", index, head.activation)
        for index, (name, kind, head) in enumerate(zip(names, kinds, heads, strict=True))
    }


def _name(model: keras.Model, head: OutputHead, known: ModelCard | None) -> str:
    """The name of the only output, by what makes it."""
    if head.kind != "other":
        return PROBABILITIES
    if known is None or not known.config:
        return OUTPUT
    return LOGITS if _is_classifier(model) else FEATURES


def _is_classifier(model: keras.Model) -> bool:
    return len(model.outputs[0].shape) == 2 and not isinstance(final_layer(model), _pooling_layers())


def _scores_classes(model: keras.Model, known: ModelCard | None, labels: list[str] | None) -> bool:
    """Whether a card or class names say that a linear output holds one score per class."""
    if not _is_classifier(model):
        return False
    labels = labels if labels is not None or known is None else known.labels
    return bool(known and known.config) or bool(labels) and len(labels) == model.outputs[0].shape[-1]


def _old_name(model: keras.Model) -> str:
    """The name that version 0.1 gave the only output. Its `logits` of a softmax classifier are the tensor before the softmax."""
    return LOGITS if _is_classifier(model) else FEATURES


def output_names(model: keras.Model) -> list[str]:
    """Return names of several outputs: dict keys, or Keras' names, or numbers where these are not unique."""
    import keras

    structure = None if isinstance(model, keras.Sequential) else model.output
    names = sorted(structure) if isinstance(structure, dict) else list(model.output_names)
    if len(names) != len(model.outputs) or len(set(names)) != len(names):
        names = [f"output_{index}" for index in range(len(model.outputs))]
    return names


def _chosen(model: keras.Model, own: dict[str, OutputSpec], wanted: Iterable[str] | None) -> dict[str, OutputSpec]:
    """The outputs asked for, by name; those of layers get their place later."""
    offered = _offered(own)
    if wanted is None:
        return own
    wanted = list(dict.fromkeys(wanted))
    if not wanted:
        raise UsageError(f"`outputs` must name at least one of {', '.join(offered)}")
    found = {}
    for name in wanted:
        inner = len(own) == 1 and (name == FEATURES or name.startswith(f"{FEATURES}_"))
        if name in offered:
            found[name] = offered[name]
        elif inner:
            found[name] = OutputSpec(name, "other", "layer")
        else:
            more = f", {FEATURES} and {FEATURES}_LAYER" if len(own) == 1 else ""
            raise UsageError(f"model {model.name!r} offers the outputs {', '.join(offered)}{more}, not {name!r}")
    return found


def _offered(own: dict[str, OutputSpec]) -> dict[str, OutputSpec]:
    """The model's own outputs, and what can be derived from a single one."""
    if len(own) > 1:
        return own
    (spec,) = own.values()
    found = dict(own)
    if spec.activation:
        found.setdefault(PROBABILITIES, replace(spec, name=PROBABILITIES))
        before = "logits" if spec.activation == "softmax" else "other"
        found[LOGITS] = replace(spec, name=LOGITS, kind=before, source="logits")
    elif spec.kind == "logits":
        found[PROBABILITIES] = OutputSpec(PROBABILITIES, "probabilities", "softmax")
    return found


def _top_outputs(model: keras.Model, own: dict[str, OutputSpec], top_k: int) -> dict[str, OutputSpec]:
    spec = next(iter(own.values()))
    shape = model.outputs[0].shape
    if len(own) > 1 or spec.kind not in ("logits", "probabilities") or len(shape) != 2:
        kinds = ", ".join(f"{name} ({spec.kind})" for name, spec in own.items())
        raise UsageError(
            f"`top_k` needs one output of logits or probabilities; model {model.name!r} has {kinds}. "
            "Declare what the output means with `output_kind` (--output-kind)"
        )
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= shape[-1]:
        raise UsageError(f"`top_k` must be from 1 to the model's {shape[-1]} classes, got {top_k!r}")
    return {
        TOP_CLASSES: OutputSpec(TOP_CLASSES, "other", "top_classes", ranked=spec.kind),
        TOP_PROBABILITIES: OutputSpec(TOP_PROBABILITIES, "other", "top_probabilities", ranked=spec.kind),
    }


def _tap(model: keras.Model, name: str) -> keras.KerasTensor:
    """The inner tensor that `features` or `features_LAYER` stands for."""
    from keras_resnet.checks import nearest

    if name == FEATURES:
        for layer in reversed(model.layers):
            if isinstance(layer, _pooling_layers()):
                return layer.input
        raise UsageError(
            f"model {model.name!r} has no global pooling and no Flatten, so `{FEATURES}` is not defined; "
            f"name a layer as in {FEATURES}_{model.layers[-1].name}"
        )
    layers = {layer.name: layer for layer in model.layers}
    wanted = name.removeprefix(f"{FEATURES}_")
    if wanted not in layers:
        raise UsageError(f"model {model.name!r} has no layer {wanted!r} for the output {name!r}{nearest(wanted, layers)}")
    return layers[wanted].output


def _with_taps(model: keras.Model, taps: dict) -> keras.Model:
    """The model with inner tensors as further outputs, itself without any."""
    import keras

    return keras.Model(model.inputs, [*model.outputs, *taps.values()]) if taps else model


def _pooling_layers() -> tuple[Any, ...]:
    from keras import layers

    kinds = ("GlobalAveragePooling", "GlobalMaxPooling")
    return (layers.Flatten, *(getattr(layers, f"{kind}{rank}D") for kind in kinds for rank in (1, 2, 3)))


def final_layer(model: keras.Model) -> keras.Layer:
    """Return the layer that makes the model's first output, looked up through nested models."""
    import keras

    from keras_resnet.graphs import producer

    layer = model.layers[-1] if isinstance(model, keras.Sequential) else producer(model.outputs[0]).operation
    return final_layer(layer) if isinstance(layer, keras.Model) and hasattr(layer, "layers") and layer.outputs else layer
