"""Random Keras models for tests of the exporter, as source code that can be read, cut down and run again.

`draw` writes a program from any `random.Random`: a seeded one, or the one that hypothesis hands out (`recipes`),
which also shrinks.
`build(seed)` runs it. Every layer class of `keras.layers` is in `KINDS`, or in `EXCLUDED` with the reason.
"""

import dataclasses
import functools
import inspect
import random
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from hypothesis import strategies as st
from keras import layers, ops

# ---------------------------------------------------------------------------------------------- layers of the user's own


@keras.saving.register_keras_serializable("generator")
class ScaledActivation(layers.Layer):
    """A layer whose attribute `activation` is not the last thing it computes."""

    def __init__(self, factor: float = 90.0, activation: str = "sigmoid", **options: Any) -> None:
        super().__init__(**options)
        self.factor, self.activation = factor, keras.activations.get(activation)

    def call(self, inputs: Any) -> Any:
        return self.factor * self.activation(inputs) - 1.0

    def get_config(self) -> dict:
        return super().get_config() | {"factor": self.factor, "activation": keras.activations.serialize(self.activation)}


@keras.saving.register_keras_serializable("generator")
class Temperature(layers.Layer):
    """Divides by the root of a positive variable; negative values of it make no sense."""

    def build(self, shape: tuple) -> None:
        self.temperature = self.add_weight(shape=(), initializer="ones", constraint="non_neg", name="temperature")

    def call(self, inputs: Any) -> Any:
        return inputs / ops.sqrt(self.temperature)


@keras.saving.register_keras_serializable("generator")
class GatedConvolution(layers.Layer):
    """Two convolutions, one as the gate of the other, held by a layer with layers."""

    def __init__(self, filters: int = 3, **options: Any) -> None:
        super().__init__(**options)
        self.filters = filters
        self.value = layers.Conv2D(filters, 3, padding="same", name="value")
        self.gate = layers.Conv2D(filters, 1, activation="sigmoid", name="gate")

    def build(self, shape: tuple) -> None:
        self.value.build(shape)
        self.gate.build(shape)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        value = self.value(inputs)
        return value * 2.0 if training else value * self.gate(inputs)

    def get_config(self) -> dict:
        return super().get_config() | {"filters": self.filters}


@keras.saving.register_keras_serializable("generator")
class SoftmaxByHand(layers.Layer):
    """A softmax that no attribute tells of, written with TensorFlow's function."""

    def call(self, inputs: Any) -> Any:
        return tf.nn.softmax(inputs)


@keras.saving.register_keras_serializable("generator")
class SubclassedDense(layers.Dense):
    """A subclass of one of Keras' own layers that computes something else after the activation."""

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return 2.0 * super().call(inputs) + 1.0


@keras.saving.register_keras_serializable("generator")
def custom_activation(x: Any) -> Any:
    """An activation function of the user's own."""
    return x * ops.sigmoid(1.5 * x)


OWN = (ScaledActivation, Temperature, GatedConvolution, SoftmaxByHand, SubclassedDense, custom_activation)

# ------------------------------------------------------------------------------------------------------- drawing programs


def call(function: str, *arguments: Any, **options: Any) -> str:
    """The source of a call; strings that start with `=` are code, and options that are None are left out."""
    code = [str(value)[1:] if str(value).startswith("=") else repr(value) for value in arguments]
    for name, value in options.items():
        if value is not None:
            code.append(f"{name}={value[1:] if str(value).startswith('=') else repr(value)}")
    return f"{function}({', '.join(code)})"


class Draw:
    """Choices for a program, all made by one `random.Random`."""

    def __init__(self, source: random.Random) -> None:
        self.random = source

    def pick(self, *options: Any) -> Any:
        return options[self.random.randint(0, len(options) - 1)]

    def number(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def chance(self, percent: int) -> bool:
        return self.random.randint(0, 99) >= 100 - percent

    def maybe(self, percent: int, *options: Any) -> Any:
        """One of the options, or None, which leaves an option of a call at its default."""
        return self.pick(*options) if self.chance(percent) else None

    def activation(self, percent: int = 50) -> str | None:
        return self.maybe(percent, *ACTIVATIONS, "=custom_activation")

    def name(self) -> str | None:
        """A layer name as users give them: mostly none, else with the characters that file formats trip over."""
        return self.maybe(12, "block one", "block_1.conv", "logits", "images", "output", "größe", "features")


ACTIVATIONS = sorted(
    name
    for name, function in vars(keras.activations).items()
    if inspect.isfunction(function) and name not in ("get", "serialize", "deserialize", "threshold", "exponential", "glu")
)

# A kind is drawn as code that reads `x`, whose shape without the batch is `shape` and whose rank is that of a map of
# `rank` dimensions: 0 is a vector, 1 a sequence, 2 an image and 3 a volume.
Writer = Callable[[Draw, int, tuple], str]


@dataclasses.dataclass(frozen=True)
class Kind:
    """How to draw one kind of layer.

    Attributes:
        ranks: Ranks of the maps it takes.
        write: Returns the code of a tensor.
    """

    ranks: tuple[int, ...]
    write: Writer


KINDS: dict[str, Kind] = {}
ANY, MAPS = (0, 1, 2, 3), (1, 2, 3)


def kind(*names: str, ranks: tuple[int, ...], more: int = 0) -> Callable[[Callable], Callable]:
    """Register a writer, which gets the name as its last argument, for layer kinds.

    A kind called `…2D` takes maps of two dimensions, and `more` for time.
    """

    def register(function: Callable) -> Callable:
        for name in names:
            on = tuple(rank for rank in ranks if not name.endswith("D") or int(name[-2]) + more == rank)
            KINDS[name] = Kind(on, functools.partial(function, name=name))
        return function

    return register


def _filters(d: Draw, groups: int = 1) -> int:
    return groups * d.number(1, 6 // groups)


def _turned(d: Draw, rank: int, shape: tuple, function: str, *arguments: Any, **options: Any) -> str:
    """A call on `x`, sometimes in channels-first layout, between two `Permute`."""
    if rank > 1 and d.chance(12):
        options["data_format"] = "channels_first"
        dims = tuple(range(1, rank + 1))
        there, back = call("layers.Permute", (rank + 1, *dims)), call("layers.Permute", (*(axis + 1 for axis in dims), 1))
        return f"{back}({call(function, *arguments, **options)}({there}(x)))"
    return f"{call(function, *arguments, **options)}(x)"


@kind("Conv1D", "Conv2D", "Conv3D", ranks=MAPS)
def _convolution(d: Draw, rank: int, shape: tuple, name: str) -> str:
    groups = d.pick(*(number for number in (1, 1, 1, 2, 3, 4) if shape[-1] % number == 0))
    dilation = d.maybe(25, 2, 3)
    kernel = d.pick(1, 2, 3, 3, 5) if d.chance(80) else tuple(d.number(1, 4) for _ in range(rank))
    return _turned(
        d, rank, shape, f"layers.{name}", _filters(d, groups), kernel,
        strides=None if dilation else d.maybe(35, 2, 3, tuple(d.number(1, 3) for _ in range(rank))),
        padding=d.maybe(65, "same", "same", *(["causal"] if rank == 1 else [])),
        dilation_rate=dilation, groups=groups if groups > 1 else None, use_bias=d.maybe(30, False),
        activation=d.activation(), name=d.name(),
    )  # fmt: skip


@kind("DepthwiseConv1D", "DepthwiseConv2D", "SeparableConv1D", "SeparableConv2D", ranks=(1, 2))
def _depthwise(d: Draw, rank: int, shape: tuple, name: str) -> str:
    dilation = d.maybe(25, 2)
    return _turned(
        d, rank, shape, f"layers.{name}", *([_filters(d)] if name.startswith("Separable") else []), d.pick(1, 2, 3, 3, 5),
        strides=None if dilation else d.maybe(30, 2), padding=d.maybe(65, "same"), dilation_rate=dilation,
        depth_multiplier=d.maybe(30, 2, 3), use_bias=d.maybe(30, False), activation=d.activation(), name=d.name(),
    )  # fmt: skip


@kind("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose", ranks=MAPS)
def _transposed(d: Draw, rank: int, shape: tuple, name: str) -> str:
    strides = d.pick(1, 2, 2, 3)
    return _turned(
        d, rank, shape, f"layers.{name}", d.number(1, 4), d.number(1, 5), strides=strides, padding=d.maybe(50, "same"),
        dilation_rate=d.maybe(15, 2) if strides == 1 else None,
        output_padding=d.maybe(15, 1) if strides > 1 else None, use_bias=d.maybe(30, False), activation=d.activation(30),
    )  # fmt: skip


@kind("MaxPooling1D", "MaxPooling2D", "MaxPooling3D", "AveragePooling1D", "AveragePooling2D", "AveragePooling3D", ranks=MAPS)
def _pooling(d: Draw, rank: int, shape: tuple, name: str) -> str:
    size = d.pick(2, 2, 3) if d.chance(80) else tuple(d.number(1, 3) for _ in range(rank))
    return _turned(d, rank, shape, f"layers.{name}", size, strides=d.maybe(40, 1, 2, 3), padding=d.maybe(50, "same"))


@kind(*(f"Adaptive{way}Pooling{rank}D" for way in ("Average", "Max") for rank in MAPS), ranks=MAPS)
def _adaptive(d: Draw, rank: int, shape: tuple, name: str) -> str:
    # TensorFlow crashes where the result is larger than the map, and in a maximum over the whole of an axis.
    least = 2 if "Max" in name else 1
    if any(size is not None and size < least for size in shape[:-1]):
        return "None"  # no tensor, which is not written
    sizes = tuple(d.number(least, min(4, size or 4)) for size in shape[:-1])
    return _turned(d, rank, shape, f"layers.{name}", sizes[0] if rank == 1 else sizes)


@kind(*(f"Global{way}Pooling{rank}D" for way in ("Average", "Max") for rank in MAPS), ranks=MAPS)
def _global_pooling(d: Draw, rank: int, shape: tuple, name: str) -> str:
    data_format = d.maybe(10, "channels_first")
    return f"{call(f'layers.{name}', keepdims=d.maybe(30, True), data_format=data_format)}(x)"


@kind("UpSampling1D", "UpSampling2D", "UpSampling3D", ranks=MAPS)
def _upsampling(d: Draw, rank: int, shape: tuple, name: str) -> str:
    if rank != 2:
        return f"{call(f'layers.{name}', 2)}(x)"
    ways = ("nearest", "bilinear", "bicubic", "lanczos3", "lanczos5")
    return _turned(d, rank, shape, "layers.UpSampling2D", d.pick(2, 3, (1, 2)), interpolation=d.maybe(50, *ways))


@kind("ZeroPadding1D", "ZeroPadding2D", "ZeroPadding3D", "Cropping1D", "Cropping2D", "Cropping3D", ranks=MAPS)
def _padding(d: Draw, rank: int, shape: tuple, name: str) -> str:
    amounts = tuple((d.number(0, 2), d.number(0, 2)) for _ in range(rank))
    return _turned(d, rank, shape, f"layers.{name}", amounts[0] if rank == 1 else amounts)


@kind("SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D", ranks=MAPS)
@kind("Dropout", "AlphaDropout", "GaussianDropout", ranks=ANY)
def _dropout(d: Draw, rank: int, shape: tuple, name: str) -> str:
    return f"{call(f'layers.{name}', 0.3, seed=d.maybe(50, 7))}(x)"


@kind("GaussianNoise", ranks=ANY)
def _noise(d: Draw, rank: int, shape: tuple, name: str) -> str:
    return "layers.GaussianNoise(0.5)(x)"


@kind("Identity", "UnitNormalization", ranks=ANY)
def _plain(d: Draw, rank: int, shape: tuple, name: str) -> str:
    return f"layers.{name}()(x)"


@kind("ActivityRegularization", ranks=ANY)
def _regularization(d: Draw, rank: int, shape: tuple, name: str) -> str:
    return "layers.ActivityRegularization(l2=0.1)(x)"


@kind("Activation", ranks=ANY)
def _activation(d: Draw, rank: int, shape: tuple, name: str) -> str:
    if d.chance(10):
        return "layers.Activation('exponential')(ops.clip(x, -5, 5))"
    if d.chance(10) and shape[-1] % 2 == 0:
        return "layers.Activation('glu')(x)"
    return f"{call('layers.Activation', d.pick(*ACTIVATIONS, '=custom_activation'))}(x)"


@kind("ReLU", ranks=ANY)
def _relu(d: Draw, rank: int, shape: tuple, name: str) -> str:
    options = {"max_value": d.maybe(40, 6, 1.0), "negative_slope": d.maybe(30, 0.1), "threshold": d.maybe(30, 0.5)}
    return f"{call('layers.ReLU', **options)}(x)"


@kind("LeakyReLU", "ELU", ranks=ANY)
def _leaky(d: Draw, rank: int, shape: tuple, name: str) -> str:
    return f"{call(f'layers.{name}', d.pick(0.1, 0.3, 1.0))}(x)"


@kind("PReLU", ranks=ANY)
def _prelu(d: Draw, rank: int, shape: tuple, name: str) -> str:
    shared = list(range(1, rank + 1)) if rank and (d.chance(70) or None in shape) else None
    return f"{call('layers.PReLU', alpha_initializer='glorot_uniform' if rank else None, shared_axes=shared)}(x)"


@kind("Softmax", ranks=ANY)
def _softmax(d: Draw, rank: int, shape: tuple, name: str) -> str:
    return f"{call('layers.Softmax', axis=d.maybe(40, 1, (1, 2)) if rank > 1 else None)}(x)"


@kind("BatchNormalization", ranks=ANY)
def _batch_norm(d: Draw, rank: int, shape: tuple, name: str) -> str:
    axis = d.maybe(10, 1) if None not in shape else None
    options = {"axis": axis, "scale": d.maybe(25, False), "center": d.maybe(25, False), "epsilon": d.maybe(40, 1e-5, 1e-2)}
    return f"{call('layers.BatchNormalization', **options, name=d.name())}(x)"


@kind("LayerNormalization", "RMSNormalization", ranks=ANY)
def _layer_norm(d: Draw, rank: int, shape: tuple, name: str) -> str:
    axis = d.maybe(30, (1, 2, 3), -1) if rank == 2 and None not in shape and name != "RMSNormalization" else None
    return f"{call(f'layers.{name}', axis=list(axis) if isinstance(axis, tuple) else axis, epsilon=d.maybe(40, 1e-6, 1e-2))}(x)"


@kind("GroupNormalization", ranks=MAPS)
def _group_norm(d: Draw, rank: int, shape: tuple, name: str) -> str:
    groups = d.pick(*(number for number in (1, 2, 3, shape[-1]) if shape[-1] % number == 0))
    return f"{call('layers.GroupNormalization', groups, scale=d.maybe(20, False), center=d.maybe(20, False))}(x)"


@kind("Normalization", ranks=ANY)
def _normalization(d: Draw, rank: int, shape: tuple, name: str) -> str:
    mean, variance = ([round(d.number(1, 20) / 10, 1) for _ in range(shape[-1])] for _ in range(2))
    return f"{call('layers.Normalization', mean=mean, variance=variance, invert=d.maybe(20, True))}(x)"


@kind("SpectralNormalization", ranks=(0, 2))
def _spectral(d: Draw, rank: int, shape: tuple, name: str) -> str:
    inner = "layers.Conv2D(4, 3, padding='same')" if rank else "layers.Dense(5)"
    return f"layers.SpectralNormalization({inner})(x)"


@kind("Rescaling", ranks=ANY)
def _rescaling(d: Draw, rank: int, shape: tuple, name: str) -> str:
    per_channel = [round(d.number(1, 20) / 10, 1) for _ in range(shape[-1])]
    return f"{call('layers.Rescaling', d.pick(2.0, 0.1, per_channel), offset=d.maybe(50, -1.0))}(x)"


@kind("Dense", ranks=ANY)
def _dense(d: Draw, rank: int, shape: tuple, name: str) -> str:
    return f"{call('layers.Dense', _filters(d), use_bias=d.maybe(25, False), activation=d.activation(), name=d.name())}(x)"


@kind("EinsumDense", ranks=ANY)
def _einsum(d: Draw, rank: int, shape: tuple, name: str) -> str:
    options = {"output_shape": (*[None] * rank, d.number(2, 5)), "bias_axes": d.maybe(60, "o")}
    places = "xyz"[:rank]
    return f"{call('layers.EinsumDense', f'b{places}c,co->b{places}o', **options)}(x)"


@kind("TimeDistributed", ranks=(1, 2))
def _time_distributed(d: Draw, rank: int, shape: tuple, name: str) -> str:
    inner = "layers.Dense(4, activation='relu')" if rank == 1 else d.pick("layers.Conv1D(3, 2)", "layers.Dense(3)")
    return f"layers.TimeDistributed({inner})(x)"


@kind("Lambda", ranks=ANY)
def _lambda(d: Draw, rank: int, shape: tuple, name: str) -> str:
    return f"layers.Lambda(lambda t: {d.pick('t * 0.5 + 1.0', 'ops.tanh(t)', 'tf.nn.relu(t - 0.1)', 'tf.square(t)')})(x)"


@kind("Masking", ranks=(1,))
def _masking(d: Draw, rank: int, shape: tuple, name: str) -> str:
    return f"layers.Masking(0.5)({d.pick('x', 'ops.round(2 * x) / 2')})"


@kind("Reshape", ranks=ANY)
def _reshape(d: Draw, rank: int, shape: tuple, name: str) -> str:
    if rank == 0:
        return f"layers.Reshape({(1, shape[0])!r})(x)"
    if None in shape:
        return f"layers.Reshape({(-1, shape[-1])!r})(x)"
    order = list(shape)
    d.random.shuffle(order)
    return f"{call('layers.Reshape', tuple(order) if d.chance(50) else (-1, *order[1:]))}(x)"


@kind("Permute", ranks=MAPS)
def _permute(d: Draw, rank: int, shape: tuple, name: str) -> str:
    order = list(range(1, rank + 2))
    d.random.shuffle(order)
    return f"{call('layers.Permute', tuple(order))}(x)"


@kind("Flatten", ranks=MAPS)
def _flatten(d: Draw, rank: int, shape: tuple, name: str) -> str:
    return f"{call('layers.Flatten', data_format=d.maybe(25, 'channels_first'))}(x)"


@kind("RepeatVector", ranks=(0,))
def _repeat(d: Draw, rank: int, shape: tuple, name: str) -> str:
    return "layers.RepeatVector(3)(x)"


@kind("Add", "Average", "Maximum", "Minimum", "Multiply", "Subtract", ranks=ANY)
def _merge(d: Draw, rank: int, shape: tuple, name: str) -> str:
    other = d.pick("ops.tanh(x)", f"layers.Dense({shape[-1]})(x)", "x")
    if rank == 2 and d.chance(40):
        other = f"layers.Conv2D({shape[-1]}, 3, padding='same', activation={d.pick('relu', 'sigmoid', None)!r})(x)"
        if d.chance(30):
            other = f"layers.GlobalAveragePooling2D(keepdims=True)({other})"
    pair = d.pick(f"x, {other}", f"{other}, x")
    third = ", 0.5 * x" if name != "Subtract" and d.chance(25) else ""
    return f"layers.{name}()([{pair}{third}])"


@kind("Concatenate", ranks=ANY)
def _concatenate(d: Draw, rank: int, shape: tuple, name: str) -> str:
    axis = d.maybe(25, 1) if rank else None
    return f"{call('layers.Concatenate', axis=axis)}([x, {d.pick('ops.sin(x)', f'layers.Dense({shape[-1]})(x)', 'x')}])"


@kind("Dot", ranks=(0, 1))
def _dot(d: Draw, rank: int, shape: tuple, name: str) -> str:
    return (
        f"{call('layers.Dot', axes=rank + 1 if rank == 0 or d.chance(50) else 1, normalize=d.maybe(40, True))}([x, ops.tanh(x)])"
    )


@kind("Resizing", ranks=(2,))
def _resizing(d: Draw, rank: int, shape: tuple, name: str) -> str:
    options = {
        "interpolation": d.maybe(50, "nearest", "bicubic", "lanczos3", "area"),
        "crop_to_aspect_ratio": d.maybe(20, True),
        "antialias": d.maybe(20, True),
    }
    if options["crop_to_aspect_ratio"] is None:
        options["pad_to_aspect_ratio"] = d.maybe(20, True)
    return f"{call('layers.Resizing', d.number(4, 14), d.number(4, 14), **options)}(x)"


@kind("CenterCrop", "RandomCrop", ranks=(2,))
def _crop(d: Draw, rank: int, shape: tuple, name: str) -> str:
    return f"{call(f'layers.{name}', d.number(2, 9), d.number(2, 9))}(x)"


AUGMENTATION = {
    "AugMix": "value_range=(0, 255)", "AutoContrast": "value_range=(0, 255)", "CutMix": "", "MixUp": "",
    "ContrastLimitedAdaptiveHistogramEqualization": "value_range=(0, 255)", "Equalization": "value_range=(0, 255)",
    "RandAugment": "value_range=(0, 255)", "RandomBrightness": "0.2", "RandomColorDegeneration": "0.3",
    "RandomColorJitter": "value_range=(0, 255), hue_factor=0.1, contrast_factor=0.2", "RandomContrast": "0.2",
    "RandomElasticTransform": "", "RandomErasing": "", "RandomFlip": "'horizontal'", "RandomGaussianBlur": "",
    "RandomGrayscale": "", "RandomHue": "0.2", "RandomInvert": "", "RandomPerspective": "", "RandomPosterization": "4",
    "RandomRotation": "0.1", "RandomSaturation": "0.3", "RandomSharpness": "0.3", "RandomShear": "0.2",
    "RandomTranslation": "0.1, 0.1", "RandomZoom": "0.2", "Solarization": "",
}  # fmt: skip


@kind(*AUGMENTATION, ranks=(2,))
def _augmentation(d: Draw, rank: int, shape: tuple, name: str) -> str:
    x = "x" if shape[-1] == 3 or d.chance(30) else "layers.Conv2D(3, 1)(x)"
    return f"layers.{name}({AUGMENTATION[name]})({x})"


@kind("Pipeline", ranks=(2,))
def _pipeline(d: Draw, rank: int, shape: tuple, name: str) -> str:
    return "layers.Pipeline([layers.Rescaling(0.5), layers.RandomFlip(), layers.CenterCrop(6, 5)])(x)"


@kind("SimpleRNN", "LSTM", "GRU", ranks=(1,))
def _recurrent(d: Draw, rank: int, shape: tuple, name: str) -> str:
    options = {
        "return_sequences": d.maybe(50, True), "go_backwards": d.maybe(20, True), "use_bias": d.maybe(20, False),
        "activation": d.maybe(20, "relu"), "reset_after": d.maybe(40, False) if name == "GRU" else None,
        "unroll": d.maybe(25, True) if None not in shape else None, "recurrent_dropout": d.maybe(10, 0.2),
    }  # fmt: skip
    return f"{call(f'layers.{name}', d.number(2, 4), **options)}(x)"


@kind("Bidirectional", ranks=(1,))
def _bidirectional(d: Draw, rank: int, shape: tuple, name: str) -> str:
    inner = call(f"layers.{d.pick('LSTM', 'GRU', 'SimpleRNN')}", 3, return_sequences=d.maybe(50, True))
    return f"{call('layers.Bidirectional', '=' + inner, merge_mode=d.maybe(40, 'sum', 'ave', 'mul'))}(x)"


@kind("RNN", "SimpleRNNCell", "LSTMCell", "GRUCell", "StackedRNNCells", ranks=(1,))
def _cells(d: Draw, rank: int, shape: tuple, name: str) -> str:
    cell = {"RNN": "layers.LSTMCell(3)", "StackedRNNCells": "layers.StackedRNNCells([layers.GRUCell(3), layers.LSTMCell(2)])"}
    return f"layers.RNN({cell.get(name, f'layers.{name}(3)')}, return_sequences={d.chance(50)})(x)"


@kind("ConvLSTM1D", "ConvLSTM2D", ranks=(2, 3), more=1)
def _conv_lstm(d: Draw, rank: int, shape: tuple, name: str) -> str:
    options = {"return_sequences": d.maybe(40, True), "padding": d.maybe(60, "same"), "strides": d.maybe(20, 2)}
    return f"{call(f'layers.{name}', 2, d.pick(1, 2, 3), **options)}(x)"


@kind("ConvLSTM3D", ranks=(3,))
def _conv_lstm3(d: Draw, rank: int, shape: tuple, name: str) -> str:
    return "layers.ConvLSTM3D(2, 2, padding='same')(ops.stack([x, 0.5 * x], axis=1))"


@kind("MultiHeadAttention", "GroupQueryAttention", ranks=(1,))
def _attention(d: Draw, rank: int, shape: tuple, name: str) -> str:
    arguments = (2, 3) if name == "MultiHeadAttention" else (4, 4, 2)
    options = {"use_bias": d.maybe(30, False), "dropout": d.maybe(20, 0.1)}
    causal = ", use_causal_mask=True" if d.chance(25) else ""
    return f"{call(f'layers.{name}', *arguments, **options)}(x, {d.pick('x', 'ops.tanh(x)')}{causal})"


@kind("Attention", "AdditiveAttention", ranks=(1,))
def _plain_attention(d: Draw, rank: int, shape: tuple, name: str) -> str:
    options = {"use_scale": d.maybe(50, True, False), "score_mode": d.maybe(30, "concat") if name == "Attention" else None}
    return f"{call(f'layers.{name}', **options)}([x, ops.tanh(x)])"


@kind("Embedding", "ReversibleEmbedding", ranks=(0, 1))
def _embedding(d: Draw, rank: int, shape: tuple, name: str) -> str:
    return f"ops.mean(layers.{name}(10, 3)(ops.cast(ops.clip(ops.abs(x), 0, 9), 'int32')), axis={rank + 1})"


@kind("CategoryEncoding", ranks=(0,))
def _category(d: Draw, rank: int, shape: tuple, name: str) -> str:
    mode = d.pick("multi_hot", "count")
    return f"layers.CategoryEncoding(6, output_mode={mode!r})(ops.cast(ops.clip(ops.abs(x), 0, 5), 'int32'))"


@kind("Discretization", ranks=ANY)
def _discretization(d: Draw, rank: int, shape: tuple, name: str) -> str:
    return "ops.cast(layers.Discretization([-0.51, 0.03, 0.77])(x), 'float32')"


@kind("STFTSpectrogram", ranks=(1,))
def _stft(d: Draw, rank: int, shape: tuple, name: str) -> str:
    return "layers.STFTSpectrogram(frame_length=4, frame_step=2, fft_length=4)(x)"


@kind("MelSpectrogram", ranks=(0,))
def _mel(d: Draw, rank: int, shape: tuple, name: str) -> str:
    return "layers.MelSpectrogram(8, 4, sampling_rate=40, num_mel_bins=4, min_freq=1, max_freq=20)(ops.repeat(x, 8, axis=1))"


# The kinds that are no layers of Keras: functions, and what users build of layers.
ELEMENTWISE = (
    "abs(x)", "arctan(x)", "clip(x, -0.5, 0.7)", "cos(x)", "erf(x)", "exp(ops.minimum(x, 3))", "expm1(ops.minimum(x, 3))",
    "floor(3 * x)", "ceil(3 * x)", "log(ops.abs(x) + 1)", "log1p(ops.abs(x))", "log2(ops.abs(x) + 1)", "logaddexp(x, 0.5)",
    "maximum(x, 0.1)", "minimum(x, 0.1)", "mod(x, 0.7)", "negative(x)", "power(ops.abs(x) + 0.1, 1.7)", "reciprocal(x * x + 1)",
    "round(3 * x)", "rsqrt(x * x + 1)", "sign(x)", "sin(x)", "sinh(ops.clip(x, -3, 3))", "sqrt(ops.abs(x) + 0.1)", "square(x)",
    "tan(ops.clip(x, -1, 1))", "tanh(x)", "where(x > 0.1, x, 0.3 * x)", "logical_and(x > 0, x < 1)", "isfinite(x)",
    "floor_divide(x, 0.3)", "cumsum(x, axis=1)", "flip(x, axis=1)", "roll(x, 1, axis=1)", "sort(x, axis=-1)", "nan_to_num(x)",
    "argsort(x, axis=-1)", "threshold(x, 0.1, -2.0)", "arcsinh(x)", "hypot(x, 0.5)", "trunc(3 * x)", "fmod(x, 0.7)",
)  # fmt: skip
REDUCING = (
    "mean", "sum", "max", "min", "var", "std", "logsumexp", "prod", "any", "all", "argmax", "argmin", "median", "count_nonzero",
)  # fmt: skip


@kind("ops", ranks=ANY)
def _function(d: Draw, rank: int, shape: tuple, name: str) -> str:
    code = f"ops.{d.pick(*ELEMENTWISE)}"
    return f"ops.cast({code}, 'float32')" if "logical" in code or "isfinite" in code or "argsort" in code else code


@kind("ops that reduce", ranks=MAPS)
def _reduction(d: Draw, rank: int, shape: tuple, name: str) -> str:
    function, keeps = d.pick(*REDUCING), d.chance(40)
    code = f"ops.{function}(x, axis={d.pick(1, -1) if function.startswith('arg') else d.pick(1, -1, (1, 2))}"
    code += ", keepdims=True)" if keeps and function != "count_nonzero" else ")"
    return f"ops.cast({code}, 'float32')" if function in ("any", "all", "argmax", "argmin", "count_nonzero") else code


@kind("ops of shapes", ranks=(2,))
def _shapes(d: Draw, rank: int, shape: tuple, name: str) -> str:
    return d.pick(
        "x[:, ::2, 1:]", "x[..., ::-1]", "ops.pad(x, [[0, 0], [1, 0], [0, 2], [0, 0]], mode='reflect')", "ops.repeat(x, 2, axis=1)",  # noqa: E501
        "ops.tile(x, [1, 1, 2, 1])", "ops.transpose(x, [0, 2, 1, 3])", "ops.concatenate(ops.split(x, [1], axis=1)[::-1], axis=1)",
        "ops.expand_dims(x, 1)[:, 0]", "ops.stack([x, 2 * x], axis=-1)[..., 1]", "ops.swapaxes(x, 1, 2)",
        "ops.einsum('bhwc,bhwd->bcd', x, x)", "ops.matmul(x, ops.transpose(x, [0, 1, 3, 2]))", "ops.moveaxis(x, 1, 2)",
        "ops.take(x, [1, 0], axis=1)", "ops.top_k(x, 1)[0]", "ops.image.resize(x, (7, 9))", "ops.max_pool(x, 2)",
        "ops.reshape(x, (ops.shape(x)[0], -1, x.shape[-1]))", "ops.one_hot(ops.argmax(x, axis=-1), x.shape[-1])",
        "ops.average_pool(x, 2, padding='same')", "ops.broadcast_to(x[:, :1], ops.shape(x))",
    )  # fmt: skip


@kind("own layer", ranks=(2,))
def _own_map(d: Draw, rank: int, shape: tuple, name: str) -> str:
    return d.pick("GatedConvolution(3)(x)", "Temperature()(x)", "ScaledActivation(2.0, 'tanh')(x)", "SubclassedDense(3)(x)")


@kind("nested model", ranks=(2,))
def _nested(d: Draw, rank: int, shape: tuple, name: str) -> str:
    if d.chance(40):
        return "keras.Sequential([layers.Conv2D(4, 3, padding='same'), layers.BatchNormalization(), layers.ReLU()])(x)"
    return f"two_headed({shape[-1]})(x)[{d.number(0, 1)}]"


@kind("squeeze and excitation", ranks=(2,))
def _squeeze(d: Draw, rank: int, shape: tuple, name: str) -> str:
    gate = d.pick("sigmoid", "hard_sigmoid", "relu6", "tanh")
    inside = f"layers.Conv2D({shape[-1]}, 1, activation={gate!r})(layers.GlobalAveragePooling2D(keepdims=True)(x))"
    return f"layers.Multiply()([x, {inside}])"


@kind("shared layer", ranks=(2,))
def _shared(d: Draw, rank: int, shape: tuple, name: str) -> str:
    return f"twice(layers.Conv2D({shape[-1]}, 3, padding='same', activation={d.pick('relu', 'sigmoid', None)!r}), x)"


@kind("U-Net", ranks=(2,))
def _unet(d: Draw, rank: int, shape: tuple, name: str) -> str:
    up = d.pick("layers.UpSampling2D()", "layers.Conv2DTranspose(3, 2, strides=2)", "layers.Conv2DTranspose(3, 3, 2, 'same')")
    return f"layers.Concatenate()([x, {up}(layers.Conv2D(4, 3, strides=2, padding='same', activation='relu')(x))])"


def two_headed(channels: int) -> keras.Model:
    """A model to be nested whose first output is a softmax and whose second is not."""
    entry = keras.Input((None, None, channels))
    scores = layers.Conv2D(3, 1, activation="softmax")(entry)
    return keras.Model(entry, [scores, layers.Conv2D(2, 3, padding="same", activation="relu")(entry)])


def twice(layer: layers.Layer, x: Any) -> Any:
    """One layer called two times."""
    return layer(layer(x) + 0.5)


NOT_LAYERS = {name for name in KINDS if not hasattr(layers, name)}
CELL = "a cell or base class without a use of its own"
FOREIGN = "wraps a model of another framework, which is not installed or is not Keras"
STRINGS = "looks strings or sparse identifiers up in tables; no part of a CNN"
EXCLUDED = {
    "Layer": CELL, "Wrapper": CELL, "InputSpec": "a description, not a layer", "InputLayer": "every model has one",
    "FlaxLayer": FOREIGN, "JaxLayer": FOREIGN, "TorchModuleWrapper": FOREIGN, "TFSMLayer": FOREIGN,
    "Hashing": STRINGS, "HashedCrossing": STRINGS, "StringLookup": STRINGS, "IntegerLookup": STRINGS, "TextVectorization": STRINGS,  # noqa: E501
    "MaxNumBoundingBoxes": "changes lists of boxes while training data is prepared, not images",
}  # fmt: skip


def layer_kinds() -> set[str]:
    """The public names of all layer classes of this Keras, one per class: aliases are left out."""
    classes: dict[type, str] = {}
    for name, thing in sorted(vars(layers).items()):
        if inspect.isclass(thing) and (thing not in classes or thing.__name__ == name):
            classes[thing] = name
    return set(classes.values())


# --------------------------------------------------------------------------------------------------------------- heads

CLASSIFIERS = {
    "softmax": "layers.Dense({n}, activation='softmax', name='scores')(x)",
    "Softmax layer": "layers.Softmax()(layers.Dense({n})(x))",
    "Activation softmax": "layers.Activation('softmax')(layers.Dense({n})(x))",
    "tf.nn.softmax": "layers.Dense({n}, activation=tf.nn.softmax)(x)",
    "ops.softmax": "ops.softmax(layers.Dense({n})(x))",
    "softmax, Reshape": "layers.Reshape(({n},))(layers.Dense({n}, activation='softmax')(x))",
    "softmax, Dropout": "layers.Dropout(0.4)(layers.Dense({n}, activation='softmax')(x))",
    "mean of softmaxes": "layers.Average()([layers.Dense({n}, activation='softmax')(x), layers.Softmax()(layers.Dense({n})(x))])",
    "softmax by hand": "SoftmaxByHand()(layers.Dense({n})(x))",
    "global pooling, Softmax": "layers.Softmax()(layers.GlobalAveragePooling2D()(layers.Conv2D({n}, 1)(x)))",
}
SIGMOIDS = {
    "binary": "layers.Dense(1, activation='sigmoid')(x)",
    "multilabel": "layers.Dense(3, activation='sigmoid')(x)",
    "Activation sigmoid": "layers.Activation('sigmoid')(layers.Dense({n})(x))",
    "shared gate": "gated(layers.Activation('sigmoid'), layers.Dense({n})(x))",
}
VALUES = {
    "logits": "layers.Dense({n}, name='scores')(x)",
    "regression": "layers.Dense(2, activation='softplus')(x)",
    "scaled activation": "ScaledActivation(90.0)(layers.Dense({n})(x))",
    "subclassed Dense": "SubclassedDense({n}, activation='softmax')(x)",
    "temperature": "Temperature()(layers.Dense({n})(x))",
    "log softmax": "layers.Dense({n}, activation='log_softmax')(x)",
    "argmax": "ops.argmax(layers.Dense({n}, activation='softmax')(x), axis=-1)",
    "unit vectors": "layers.UnitNormalization()(layers.Dense({n})(x))",
    "features": "x",
}
MAP_HEADS = {
    "sigmoid map": "layers.Conv2D(1, 1, activation='sigmoid', name='mask')(x)",
    "faint sigmoid map": "layers.Activation('sigmoid')(layers.Conv2D(1, 1)(x) - 7.0)",
    "softmax map": "layers.Conv2D({n}, 3, padding='same', activation='softmax')(x)",
    "convolution": "layers.Conv2D({n}, 3)(x)",
    "boxes": "ops.exp(ops.minimum(layers.Conv2D(4, 1)(x), 4.0))",
    "map": "x",
}
HEADS = CLASSIFIERS | SIGMOIDS | VALUES
SEVERAL = {
    "list": "[{a}, {b}]",
    "dict": "{{'class': {a}, 'box': {b}}}",
    "dict of one": "{{'only': {a}}}",
    "nested": "{{'heads': [{a}, {b}], 'raw': x}}",
    "the same tensor twice": "twofold({a})",
}


def gated(gate: layers.Layer, scores: Any) -> Any:
    """One activation object used as a gate and as the head."""
    return gate(scores * gate(0.5 * scores))


def twofold(x: Any) -> list:
    """Two outputs that are one tensor."""
    return [x, x]


# ------------------------------------------------------------------------------------------------------------- programs

NAMESPACE = {"keras": keras, "layers": layers, "ops": ops, "tf": tf, "np": np, "two_headed": two_headed, "twice": twice}
NAMESPACE |= {"gated": gated, "twofold": twofold} | {thing.__name__: thing for thing in OWN}
ENTRY = "x = inputs = keras.Input("
FLOATS = ("float32", "float32", "float32", "float32", "float32", "float32", "mixed_float16", "mixed_bfloat16", "float64")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A model as a program, and how to export it.

    Attributes:
        lines: Python source, run in `NAMESPACE`; the last line makes `model`.
        seed: Seed of the weights.
        policy: Keras' dtype policy while the program runs.
        trained: Whether batch-norm statistics, biases and gates get random values; fresh ones hide errors.
        pixels: Whether float inputs are 0–255, not small normal numbers.
        options: Keyword arguments of `to_onnx`.
        kinds: What the program was drawn to contain.
    """

    lines: tuple[str, ...]
    seed: int = 0
    policy: str = "float32"
    trained: bool = True
    pixels: bool = False
    options: dict = dataclasses.field(default_factory=dict)
    kinds: tuple[str, ...] = ()

    @property
    def description(self) -> str:
        """The program, and what else there is to say."""
        facts = f"# policy {self.policy}, seed {self.seed}, {'random' if self.trained else 'fresh'} statistics, options {self.options}"  # noqa: E501
        return "\n".join([facts, *self.lines])

    def model(self, policy: str | None = None, size: str | None = None) -> keras.Model:
        """Run the program.

        Args:
            policy: Another dtype policy than the recipe's own.
            size: Replaces the height and width of the input, `"None, None"` for instance.

        Returns:
            The model, with the weights that the recipe's seed gives it.
        """
        before = keras.config.dtype_policy()
        keras.utils.clear_session(free_memory=False)
        keras.config.set_dtype_policy(policy or self.policy)  # which clear_session forgets
        keras.utils.set_random_seed(self.seed)
        scope = dict(NAMESPACE)
        try:
            for line in self.lines:
                if size and line.startswith(ENTRY):
                    line = _with_size(line, size)
                exec(line, scope)
            model = scope["model"]
            randomise(model, self.seed, self.trained)
            return model
        finally:
            keras.config.set_dtype_policy(before)


def _with_size(line: str, size: str) -> str:
    shape, rest = line[len(ENTRY) + 1 :].split(")", 1)
    return f"{ENTRY}({size}, {shape.split(', ')[-1]}){rest}"


POSITIVE = ("gamma", "moving_variance", "variance", "scale")


def randomise(model: keras.Model, seed: int, trained: bool) -> None:
    """Give statistics, scales and biases random values within the domain of each variable.

    Args:
        model: A built model.
        seed: Seed of the values.
        trained: False leaves them as they are, as in a model that was never trained.
    """
    rng = np.random.default_rng(seed)
    for variable in model.variables if trained else ():
        if not variable.dtype.startswith(("float", "bfloat")):
            continue
        if variable.name in POSITIVE or isinstance(variable.constraint, keras.constraints.NonNeg):
            variable.assign(rng.uniform(0.5, 1.5, variable.shape))
        elif variable.name in ("bias", "beta", "moving_mean", "mean", "alpha"):
            variable.assign(rng.normal(0, 0.3, variable.shape))


def draw(source: random.Random, focus: tuple[str, ...] = ()) -> Recipe:
    """Draw a recipe.

    Args:
        source: Makes all choices. The simplest choices come first, which is what hypothesis shrinks to.
        focus: Kinds that the program is to contain, if they fit.

    Returns:
        A recipe whose program has run without an error.
    """
    return _Writing(Draw(source), focus).recipe()


class _Writing:
    """A program while it is being written: each line is run at once, and kept only if Keras accepts it."""

    def __init__(self, d: Draw, focus: tuple[str, ...]) -> None:
        self.d, self.focus = d, sorted(focus, key=lambda name: -min(KINDS[name].ranks))
        self.lines: list[str] = []
        self.kinds: list[str] = []
        self.scope = dict(NAMESPACE)

    @property
    def x(self) -> Any:
        return self.scope["x"]

    @property
    def rank(self) -> int:
        return len(self.x.shape) - 2

    def run(self, *lines: str) -> bool:
        scope = dict(self.scope)
        try:
            for line in lines:
                exec(line, scope)
        except Exception:  # whatever Keras does not take is no model
            return False
        x = scope["x"]
        tensor = isinstance(x, keras.KerasTensor)
        if "model" not in scope and (
            not tensor or len(x.shape) < 2 or not _small(x) or not x.dtype.startswith(("float", "bfloat"))
        ):
            return False
        self.scope = scope
        self.lines += lines
        return True

    def recipe(self) -> Recipe:
        d = self.d
        policy = d.pick(*FLOATS)
        before = keras.config.dtype_policy()
        keras.config.set_dtype_policy(policy)
        try:
            pixels = self.entry()
            for name in self.steps():
                self.step(name)
            head = self.head()
        finally:
            keras.config.set_dtype_policy(before)
        kinds, trained = (*self.kinds, f"head: {head}"), not d.chance(20)
        return Recipe(tuple(self.lines), d.number(0, 9999), policy, trained, pixels, self.options(head), kinds)

    def entry(self) -> bool:
        """Write the inputs. Returns whether float images are 0–255."""
        d = self.d
        rank = max(next((min(KINDS[name].ranks, key=lambda rank: abs(rank - 2)) for name in self.focus), 2), 1)
        size = [d.number(8, 16) for _ in range(rank)] if rank < 3 else [d.number(3, 6) for _ in range(3)]
        if rank == 2 and d.chance(15):
            size = [None, None]
        dtype = d.maybe(25, "uint8", "int32") if rank == 2 else None
        shape = "=(" + ", ".join(map(str, [*size, d.pick(3, 1, 2, 4, 5, 6)])) + ")"
        line = f"x = inputs = {call('keras.Input', shape, dtype=dtype, name=d.name())}"
        exec(line, self.scope)
        self.lines.append(line)
        pixels = bool(dtype) or d.chance(40)
        if dtype and d.chance(40):
            self.run("x = ops.cast(x, 'float32')")
        if not dtype and not pixels:
            return False
        if dtype and len(self.lines) == 1 or d.chance(60):
            self.run(f"x = layers.Rescaling({d.pick('1 / 255', '1 / 127.5, offset=-1')})(x)")
        return pixels

    def steps(self) -> list[str]:
        """The kinds to write: those asked for, and others that fit next to them."""
        d, steps = self.d, list(self.focus)
        for _ in range(d.number(0, 3)):
            place = d.number(0, len(steps))
            near = steps[min(place, len(steps) - 1)] if steps else "Conv2D"
            steps.insert(place, d.pick(*(name for name in KINDS if set(KINDS[name].ranks) & set(KINDS[near].ranks))))
        return steps

    def step(self, name: str) -> None:
        """Write one kind, with options that Keras accepts for the tensor that is there."""
        self.reach(KINDS[name].ranks)
        for _ in range(6):
            if self.rank in KINDS[name].ranks:
                shape = tuple(self.x.shape[1:])
                if None in shape[-1:]:
                    return
                if self.run(f"x = {KINDS[name].write(self.d, self.rank, shape)}"):
                    self.kinds.append(name)
                    return

    def reach(self, ranks: tuple[int, ...]) -> None:
        """Turn a map into one of these ranks."""
        d = self.d
        for _ in range(3):
            if self.rank in ranks:
                return
            shape = tuple(self.x.shape[1:])
            if self.rank > max(ranks) or self.rank > 3:
                if self.rank == 1:
                    way = d.pick("layers.GlobalAveragePooling1D()(x)", "layers.Flatten()(x)", "layers.GlobalMaxPooling1D()(x)")
                    self.run(f"x = {way}") or self.run("x = layers.GlobalAveragePooling1D()(x)")
                elif self.rank == 2 and max(ranks) == 0:
                    ways = ("layers.GlobalAveragePooling2D()(x)", "layers.GlobalMaxPooling2D()(x)", "ops.mean(x, axis=(1, 2))")
                    self.run(f"x = {d.pick(*ways, 'layers.Flatten()(x)')}") or self.run(f"x = {ways[0]}")
                else:
                    ways = (f"layers.Reshape({(-1, *shape[2:])!r})(x)", "ops.max(x, axis=1)")
                    self.run(f"x = {d.pick(*ways)}") or self.run(f"x = {ways[1]}")
            elif self.rank == 0:
                self.run(f"x = {d.pick('layers.RepeatVector(4)(x)', 'layers.Reshape((-1, 1))(x)')}")
            else:
                self.run(f"x = ops.expand_dims(x, {self.rank + 1})")

    def head(self) -> str:
        """Write the outputs and the model. Returns the name of the head, `"several"` of more than one."""
        d, n = self.d, self.d.number(2, 6)
        inputs, second = "inputs", None
        if self.rank == 2 and d.chance(25):
            name = d.pick(*MAP_HEADS)
            outputs = MAP_HEADS[name].format(n=n)
        else:
            name = d.pick(*HEADS)
            if name == "global pooling, Softmax":
                self.reach((2,))
            if self.rank != 2 or "Pooling" not in HEADS[name]:
                self.reach((0,))
                second = d.maybe(12, "int32", "float32")
            outputs = HEADS[name].format(n=n)
        if second:
            self.lines.append(line := f"second = keras.Input((4,), dtype={second!r}, name='meta')")
            exec(line, self.scope)
            code = "layers.Flatten()(layers.Embedding(20, 2)(second))" if second == "int32" else "second"
            if self.run(f"x = layers.Concatenate()([x, {code}])"):
                inputs = d.pick("[inputs, second]", "{'image': inputs, 'meta': second}")
        if d.chance(20):
            if self.rank == 0:
                b = HEADS[d.pick(*SIGMOIDS, *VALUES)].format(n=n).replace("'scores'", "'values'")
            else:
                b = "layers.Conv2D(2, 3, activation='tanh')(x)"
            name, outputs = "several", SEVERAL[d.pick(*SEVERAL)].format(a=outputs, b=b)
        lines = [f"outputs = {outputs}", f"model = keras.Model({inputs}, outputs)"]
        if name != "several" and inputs == "inputs" and d.chance(12):
            lines += [
                "entry = keras.Input(model.input.shape[1:], dtype=model.input.dtype)",
                "model = keras.Model(entry, model(entry))",
            ]
        if not self.run(*lines):
            name = "features"
            if not self.run("outputs = x", f"model = keras.Model({inputs}, outputs)"):
                raise ValueError("this program makes no model")
        return name

    def options(self, head: str) -> dict:
        """Options of the export, drawn from those that this model should allow."""
        d, model, found = self.d, self.scope["model"], {}
        shape, single = tuple(model.inputs[0].shape), len(model.inputs) == 1
        image, fixed = len(shape) == 4, None not in shape[1:]
        if d.chance(40):
            found["opset"] = d.pick(13, 15, 18, 21, 23)
        if image and d.chance(20):
            found["layout"] = "nchw"
        if single and image and model.inputs[0].dtype == "float32" and d.chance(25):
            found["input_dtype"] = "uint8"
            if fixed and d.chance(40):
                found["resize"] = True
        if single and image and "resize" not in found and d.chance(25):
            opens = self.opens()
            if opens or d.chance(30):
                found["dynamic_size"] = True
        if head in CLASSIFIERS and d.chance(20):
            found["top_k"] = 2
            if head == "softmax by hand":  # no attribute tells of it
                found["output_kind"] = "probabilities"
        if head in ("softmax", "Softmax layer", "Activation softmax") and d.chance(20):
            found["outputs"] = ["logits", "probabilities"]
        if d.chance(8):
            found["precision"] = "float16"
        return found

    def opens(self) -> bool:
        """Whether Keras accepts the program with an input without a size."""
        scope = dict(NAMESPACE)
        try:
            for line in self.lines:
                exec(_with_size(line, OPEN) if line.startswith(ENTRY) else line, scope)
        except Exception:
            return False
        return [weight.shape for weight in scope["model"].weights] == [weight.shape for weight in self.scope["model"].weights]


OPEN = "None, None"
MOST = 4096


def _small(x: Any) -> bool:
    return all(size is None or 0 < size <= MOST for size in x.shape[1:]) and np.prod([size or 8 for size in x.shape[1:]]) <= MOST


def focus_of(seed: int) -> tuple[str, ...]:
    """Three kinds for a seed; any 60 consecutive seeds have all kinds."""
    names = list(KINDS)
    random.Random(15).shuffle(names)
    return tuple(names[(3 * seed + step) % len(names)] for step in range(3))


def recipe(seed: int) -> Recipe:
    """The recipe of a seed."""
    for attempt in range(20):
        try:
            return draw(random.Random(f"{seed}.{attempt}"), focus_of(seed))
        except ValueError:
            continue
    raise RuntimeError(f"seed {seed} gives no model")


def recipes() -> st.SearchStrategy[Recipe]:
    """Recipes for hypothesis, whose shrinking makes every choice the first of its options."""
    return st.randoms(use_true_random=False).map(draw)


SIZES = ((24, 32), (32, 48), (64, 64), (96, 128))


def feeds_of(recipe: Recipe, model: keras.Model, seed: int = 0) -> list[list[np.ndarray]]:
    """Batches that the model accepts and answers with finite numbers.

    Args:
        recipe: Says whether float images are pixels.
        model: The model, which is run on each batch; its states are put back afterwards.
        seed: Seed of the values.

    Returns:
        Up to two lists of arrays in the order of `model.inputs`: batches of two and of one, of two sizes where the size is open.
    """
    rng, found = np.random.default_rng(seed), []
    shape = tuple(model.inputs[0].shape)
    sizes = SIZES if None in shape[1:-1] else (shape[1:-1],) * 2
    for batch, size in zip((2, 1, 3, 2), sizes, strict=False):
        feeds = []
        for position, tensor in enumerate(model.inputs):
            dims = (batch, *size, tensor.shape[-1]) if position == 0 else (batch, *tensor.shape[1:])
            if tensor.dtype.startswith(("int", "uint")):
                values = rng.integers(0, 256 if position == 0 else 20, dims)
            elif position == 0 and (recipe.pixels or recipe.options.get("input_dtype") == "uint8"):
                values = rng.integers(0, 256, dims)
            else:
                values = rng.normal(size=dims)
            feeds.append(values.astype(tensor.dtype))
        try:
            finite = all(np.isfinite(output.astype("float64")).all() for output in outputs_of(model, feeds))
        except Exception:  # a size that the architecture does not take
            finite = False
        found += [feeds] if finite else []
        if len(found) == 2:
            break
    return found


def outputs_of(model: keras.Model, feeds: list[np.ndarray]) -> list[np.ndarray]:
    """`model(feeds, training=False)` as a flat list; states that the call moves are put back."""
    before = [np.array(variable.value) for variable in model.variables]
    inputs = [ops.convert_to_tensor(value) for value in feeds]
    tree = keras.tree.pack_sequence_as(model.input, inputs) if keras.tree.is_nested(model.input) else inputs[0]
    found = [_array(output) for output in keras.tree.flatten(model(tree, training=False))]
    for variable, value in zip(model.variables, before, strict=True):
        if np.array(variable.value).tobytes() != value.tobytes():
            variable.assign(value)
    return found


def _array(tensor: Any) -> np.ndarray:
    array = np.asarray(tensor)
    return array.astype("float32") if array.dtype.name in ("bfloat16", "float16") else array


def build(seed: int) -> tuple[keras.Model, dict, list[list[np.ndarray]], str]:
    """The model of a seed, its export options, batches for it, and its source."""
    drawn = recipe(seed)
    model = drawn.model()
    return model, drawn.options, feeds_of(drawn, model), drawn.description
