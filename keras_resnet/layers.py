"""The layers Keras lacks. All are registered, so `keras.saving.load_model` needs no `custom_objects`."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Collection, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from .checks import positive_number, probability

PACKAGE = "keras_resnet"
# Where a file of weights holds the card, among the variables of the layer.
STORED_CARD = "card"
register = keras.saving.register_keras_serializable(PACKAGE)


@register
class Dirac(keras.initializers.Initializer):
    """Kernels of convolutions that begin as the identity: the first filters pass on one channel each, the others are random.

    Keras' `Identity` fills one kernel of two axes only. A convolution that widens passes all its channels on, and its further
    filters are drawn uniformly from ±1/√(number of incoming connections), which is torch's default.

    Args:
        seed: Seed of the random filters. Default: a new one.

    Source: Zagoruyko and Komodakis (arXiv 1706.00388); with widening Jordan (arXiv 2404.00498), section 3.3.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = random.randint(1, 10**9) if seed is None else seed

    def __call__(self, shape: Sequence[int], dtype: Any = None) -> Any:
        *sides, channels, filters = shape
        passed = min(channels, filters)
        limit = float(channels * np.prod(sides)) ** -0.5
        kernel = np.random.default_rng(self.seed).uniform(-limit, limit, shape).astype("float32")
        kernel[..., :passed] = 0
        np.fill_diagonal(kernel[tuple(side // 2 for side in sides)], 1)  # a view of `[channels, filters]` at the middle
        return ops.convert_to_tensor(kernel, dtype=dtype)

    def get_config(self) -> dict[str, Any]:
        return {"seed": self.seed}


@register
class ResidualAdd(keras.layers.Layer):
    """Add a residual branch to its shortcut: `shortcut + scale · branch`.

    `drift`, `prune`, parameter groups and reports recognise residual blocks by this layer. It differs from `keras.layers.Add`:
    it takes exactly two inputs, the shortcut first, and the sum has the shortcut's dtype. Only the branch is cast, so that a
    block built under a mixed policy does not round a float32 backbone.

    Args:
        block: Name of the block, which is the prefix of its layers' names.
        gate: What holds the branch at zero in the beginning (a key of `keras_resnet.growth.GATES`), or None.
        kind: `"preact"` if nothing follows the addition, `"postact"` if a ReLU that belongs to the block does.
        grown: Whether `grow`, `residual_stack` or `ResidualBlock` added the block (and not an architecture).
        scale: Constant factor of the branch, a positive number. It is applied after the gate, in the shortcut's dtype, so that
            a closed gate gives exactly zero whatever the factor. Default 1.

    Call arguments:
        inputs: `[shortcut, branch]`, two tensors of the same shape.

    Raises:
        ValueError: `kind` is unknown, or `scale` is not a positive finite number.

    Source: He et al. 2015 (arXiv 1512.03385), equation 1.
    """

    def __init__(
        self,
        block: str | None = None,
        gate: str | None = None,
        kind: str = "preact",
        grown: bool = False,
        scale: float = 1.0,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("autocast", False)
        super().__init__(**kwargs)
        if kind not in ("preact", "postact"):
            raise ValueError(f'`kind` must be "preact" or "postact", got {kind!r}')
        self.block, self.gate, self.kind, self.grown = block, gate, kind, bool(grown)
        self.scale = positive_number("scale", scale)
        self.supports_masking = True

    def call(self, inputs: Sequence[keras.KerasTensor]) -> keras.KerasTensor:
        shortcut, branch = inputs
        return shortcut + self.scaled(branch, shortcut.dtype)

    def scaled(self, branch: keras.KerasTensor, dtype: Any) -> keras.KerasTensor:
        """Return what is added to the shortcut: the branch in the given dtype, times `scale`."""
        branch = ops.cast(branch, dtype)
        return branch if self.scale == 1 else branch * self.scale

    def compute_output_spec(self, inputs: Sequence[keras.KerasTensor]) -> keras.KerasTensor:
        shortcut, branch = inputs
        if len(shortcut.shape) != len(branch.shape) or any(
            a is not None and b is not None and a != b for a, b in zip(shortcut.shape, branch.shape, strict=True)
        ):
            raise ValueError(
                f"shortcut and branch of a residual block must have one shape, got {shortcut.shape} and {branch.shape}"
            )
        return keras.KerasTensor(shortcut.shape, dtype=shortcut.dtype)

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> Any:
        # The block changes nothing at first, so the shortcut's mask stays valid.
        return previous_mask[0] if isinstance(previous_mask, (list, tuple)) else previous_mask

    def get_config(self) -> dict[str, Any]:
        own = {"block": self.block, "gate": self.gate, "kind": self.kind, "grown": self.grown, "scale": self.scale}
        return {**super().get_config(), **own}


@register
class IgnoreMask(keras.layers.Layer):
    """Pass a tensor on without its mask; convolutions warn about masks, which they cannot use.

    A residual branch needs it where the tensor it starts from has a mask. The shortcut keeps the mask, and so does the block.
    """

    def call(self, inputs: keras.KerasTensor) -> keras.KerasTensor:
        return ops.copy(inputs)

    def compute_output_spec(self, inputs: keras.KerasTensor) -> keras.KerasTensor:
        return keras.KerasTensor(inputs.shape, dtype=inputs.dtype)

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> None:
        return None

    def get_config(self) -> dict[str, Any]:
        # Keras' automatic config does not take a dtype policy.
        return super().get_config()


# Fields of a config in which a model may differ from the network that its weights were trained in. All other fields change what
# the weights mean.
MAY_DIFFER = frozenset(
    "num_classes input_size channels output_stride gate drop_path dropout head_dropout norm_momentum initializer".split()
)


def config_differences(saved: dict, own: dict, may_differ: Collection[str] = ()) -> list[str]:
    """Compare the config of a network whose weights are loaded with that of the model they are loaded into.

    Args:
        saved: Config in which the weights were trained, as plain JSON values.
        own: Config of the model, likewise. Fields that only one of the two has are not compared.
        may_differ: Fields that may differ in addition to `MAY_DIFFER`.

    Returns:
        Messages such as `"shortcut='pad', the model has 'none'"`, one for each field that changes the outputs.
    """
    if saved.get("family") != own.get("family"):
        return [f"family={saved.get('family')!r}, the model has {own.get('family')!r}"]
    # A model that was grown by hand does not say so in its config; there the names of the layers tell.
    free = {*MAY_DIFFER, *may_differ, *(() if saved.get("growth") and own.get("growth") else ("growth",))}
    pairs = {name: (saved[name], own[name]) for name in own if name in saved and name not in free}
    return [f"{name}={_shown(was)!r}, the model has {_shown(has)!r}" for name, (was, has) in pairs.items() if was != has]


def _shown(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


@register
class Card(keras.layers.Layer):
    """Store a model's card in the model; the layer returns its input unchanged.

    The card is a layer because Keras saves layers, but not attributes of a Functional model. The layer is pinned to float32,
    since a mixed policy would round pixels. Read the card with `keras_resnet.card(model)`.

    Weight files (`.weights.h5`) contain the card as well. Keras' own `load_weights` can therefore warn when a file belongs to
    another variant whose weights have the same shapes. The model keeps its own card then.

    Args:
        card: JSON-serialisable dict, see `keras_resnet.modelcard.ModelCard`.
    """

    def __init__(self, card: dict[str, Any], **kwargs: Any) -> None:
        kwargs["dtype"] = "float32"
        super().__init__(**kwargs)
        self.card = dict(card)

    def call(self, inputs: keras.KerasTensor) -> keras.KerasTensor:
        return inputs

    def compute_output_spec(self, inputs: keras.KerasTensor) -> keras.KerasTensor:
        return keras.KerasTensor(inputs.shape, dtype=inputs.dtype)

    def save_own_variables(self, store: Any) -> None:
        store[STORED_CARD] = np.frombuffer(json.dumps(self.card, sort_keys=True).encode(), "uint8")

    def load_own_variables(self, store: Any) -> None:
        if STORED_CARD not in store.keys():
            return
        saved = json.loads(np.asarray(store[STORED_CARD]).tobytes())
        if saved.get("config") and self.card.get("config"):
            if found := config_differences(saved["config"], self.card["config"]):
                warnings.warn(f"the weights were trained in another network: {'; '.join(found)}", stacklevel=2)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "card": self.card}


@register
class Affine(keras.layers.Layer):
    """Compute `scale · x + shift` with a learned scale and shift, without normalisation.

    Args:
        scale: `"scalar"` (one number), `"channel"` (one per channel) or None (no scale).
        initial: Initial value of the scale. Default 1.
        shift: Whether to add a scalar shift, which starts at 0. Default False.
        axis: Channel axis, for `scale="channel"`. Default -1.

    Source: SkipInit (arXiv 2002.10444), LayerScale (arXiv 2103.17239), Fixup (arXiv 1901.09321).
    """

    def __init__(self, scale: str = "scalar", initial: float = 1.0, shift: bool = False, axis: int = -1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if scale not in ("scalar", "channel", None):
            raise ValueError(f'`scale` must be "scalar", "channel" or None, got {scale!r}')
        self.scale_kind, self.initial, self.use_shift, self.axis = scale, float(initial), bool(shift), axis
        self.supports_masking = True

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        shape = ()
        if self.scale_kind == "channel":
            shape = [1] * (len(input_shape) - 1)
            axis = self.axis % len(input_shape)
            shape[axis - 1] = input_shape[axis]
        self.scale = self.shift = None
        if self.scale_kind:
            self.scale = self.add_weight(name="scale", shape=shape, initializer=keras.initializers.Constant(self.initial))
        if self.use_shift:
            self.shift = self.add_weight(name="shift", shape=(), initializer="zeros")

    def call(self, inputs: keras.KerasTensor) -> keras.KerasTensor:
        x = inputs if self.scale is None else inputs * ops.cast(self.scale, inputs.dtype)
        return x if self.shift is None else x + ops.cast(self.shift, inputs.dtype)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        own = {"scale": self.scale_kind, "initial": self.initial, "shift": self.use_shift, "axis": self.axis}
        return {**super().get_config(), **own}


@register
class DropPath(keras.layers.Layer):
    """Drop the whole branch of random samples in training (stochastic depth), for which Keras has no public layer.

    Args:
        rate: Probability that a sample's branch is dropped. The branches that remain are scaled by 1 / (1 − rate).
        seed: Seed of the layer's random generator.

    Source: arXiv 1603.09382, section 3.
    """

    def __init__(self, rate: float, seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rate, self.seed = probability("rate", rate), seed
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.supports_masking = True

    def call(self, inputs: keras.KerasTensor, training: bool | None = False) -> keras.KerasTensor:
        if not training or not self.rate:
            return inputs
        shape = (ops.shape(inputs)[0],) + (1,) * (len(inputs.shape) - 1)
        kept = keras.random.uniform(shape, seed=self.seed_generator) >= self.rate
        return inputs * ops.cast(kept, inputs.dtype) / (1 - self.rate)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "rate": self.rate, "seed": self.seed}


class _Spatial(keras.layers.Layer):
    """Base of layers without weights that work on feature maps of any rank in either data format."""

    def __init__(self, data_format: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.data_format = data_format or keras.config.image_data_format()
        if self.data_format not in ("channels_last", "channels_first"):
            raise ValueError(f'`data_format` must be "channels_last" or "channels_first", got {data_format!r}')

    def channel_axis(self, shape: Sequence[int | None]) -> int:
        return len(shape) - 1 if self.data_format == "channels_last" else 1

    def spatial_axes(self, shape: Sequence[int | None]) -> list[int]:
        return [axis for axis in range(1, len(shape)) if axis != self.channel_axis(shape)]

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "data_format": self.data_format}


@register
class ChannelPad(_Spatial):
    """Append channels of zeros: the shortcut without parameters ("option A") where the number of channels grows.

    Args:
        filters: Number of channels of the output.
        position: `"both"` puts half of the zeros before the channels and half after them, `"end"` puts all of them after.

    Raises:
        ValueError: The input has more channels than `filters`.

    Source: arXiv 1512.03385, section 3.3. The paper does not say where the zeros go, and published implementations differ.
    """

    def __init__(self, filters: int, position: str = "both", data_format: str | None = None, **kwargs: Any) -> None:
        super().__init__(data_format, **kwargs)
        if position not in ("both", "end"):
            raise ValueError(f'`position` must be "both" or "end", got {position!r}')
        self.filters, self.position = filters, position

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        channels = input_shape[self.channel_axis(input_shape)]
        if channels > self.filters:
            raise ValueError(f"`filters` must be at least the channels that come in ({channels}), got {self.filters}")

    def call(self, inputs: keras.KerasTensor) -> keras.KerasTensor:
        axis = self.channel_axis(inputs.shape)
        missing = self.filters - inputs.shape[axis]
        before = missing // 2 if self.position == "both" else 0
        padding = [(0, 0)] * len(inputs.shape)
        padding[axis] = (before, missing - before)
        return ops.pad(inputs, padding)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        shape = list(input_shape)
        shape[self.channel_axis(shape)] = self.filters
        return tuple(shape)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "filters": self.filters, "position": self.position}


@register
class InfinityPad(_Spatial):
    """Pad both ends of every spatial axis with −∞ for a max pooling, as torch does; Keras pads with zeros or at one end only.

    Args:
        size: Number of positions at each end. Default 1.
    """

    def __init__(self, size: int = 1, data_format: str | None = None, **kwargs: Any) -> None:
        super().__init__(data_format, **kwargs)
        self.size = size

    def call(self, inputs: keras.KerasTensor) -> keras.KerasTensor:
        padding = [(0, 0)] * len(inputs.shape)
        for axis in self.spatial_axes(inputs.shape):
            padding[axis] = (self.size, self.size)
        return ops.pad(inputs, padding, constant_values=float("-inf"))

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        shape = list(input_shape)
        for axis in self.spatial_axes(shape):
            shape[axis] = None if shape[axis] is None else shape[axis] + 2 * self.size
        return tuple(shape)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "size": self.size}


@register
class BlurPool(_Spatial):
    """Blur with the kernel 1-2-1 and reflected borders, then keep every second pixel, along one spatial axis after the other.

    Source: arXiv 1904.11486, section 3.
    """

    def call(self, inputs: keras.KerasTensor) -> keras.KerasTensor:
        for axis in self.spatial_axes(inputs.shape):
            inputs = self._along(inputs, axis)
        return inputs

    @staticmethod
    def _along(x: keras.KerasTensor, axis: int) -> keras.KerasTensor:
        def part(start: Any, stop: Any = None, step: Any = None) -> Any:
            index = [slice(None)] * len(x.shape)
            index[axis] = slice(start, stop, step)
            return tuple(index)

        padded = ops.concatenate([x[part(1, 2)], x, x[part(-2, -1)]], axis=axis)
        return (padded[part(0, -2, 2)] + 2 * padded[part(1, -1, 2)] + padded[part(2, None, 2)]) / 4

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        shape = list(input_shape)
        for axis in self.spatial_axes(shape):
            shape[axis] = None if shape[axis] is None else (shape[axis] + 1) // 2
        return tuple(shape)


@register
class AdaptiveAverage(_Spatial):
    """Average a feature map to a fixed size; like torch's layer and unlike Keras', it also enlarges smaller maps.

    Args:
        size: Spatial size of the output. Cell i is the mean of the positions from ⌊i·side/size⌋ to ⌈(i+1)·side/size⌉.

    Raises:
        ValueError: The spatial sides of the input are dynamic.
    """

    def __init__(self, size: int, data_format: str | None = None, **kwargs: Any) -> None:
        super().__init__(data_format, **kwargs)
        self.size = size

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        if any(input_shape[axis] is None for axis in self.spatial_axes(input_shape)):
            raise ValueError(f"the sides of the input must be known, got {tuple(input_shape)}")

    def call(self, inputs: keras.KerasTensor) -> keras.KerasTensor:
        for axis in self.spatial_axes(inputs.shape):
            weights = ops.cast(self._weights(inputs.shape[axis]), inputs.dtype)
            inputs = ops.moveaxis(ops.tensordot(inputs, weights, [[axis], [0]]), -1, axis)
        return inputs

    def _weights(self, side):
        cells = np.arange(self.size)
        first, end = cells * side // self.size, -(-(cells + 1) * side // self.size)
        places = np.arange(side)[:, None]
        inside = (places >= first) & (places < end)
        return (inside / inside.sum(0)).astype("float32")

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        shape = list(input_shape)
        for axis in self.spatial_axes(shape):
            shape[axis] = self.size
        return tuple(shape)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "size": self.size}


@register
class GroupNormalization(keras.layers.GroupNormalization):
    """Normalise groups of channels like Keras' layer, but more accurately: means are taken axis by axis.

    A single float32 sum over thousands of numbers loses digits that matter in a deep network. The arguments and weights are
    those of Keras' layer. The logits of BiT networks are 2 to 3 times closer to those computed in float64.
    """

    def call(self, inputs: keras.KerasTensor) -> keras.KerasTensor:
        dtype = keras.backend.result_type(inputs.dtype, "float32")
        shape, axis, rank = ops.shape(inputs), self.axis % len(inputs.shape), len(inputs.shape)
        grouped = (*shape[:axis], self.groups, inputs.shape[axis] // self.groups, *shape[axis + 1 :])
        x = ops.reshape(ops.cast(inputs, dtype), grouped)
        x = x - self._means(x, axis)
        x = x * ops.rsqrt(self._means(ops.square(x), axis) + self.epsilon)
        per_channel = [1] * rank
        per_channel[axis] = -1
        x = ops.reshape(x, shape)
        if self.scale:
            x = x * ops.reshape(ops.cast(self.gamma, dtype), per_channel)
        if self.center:
            x = x + ops.reshape(ops.cast(self.beta, dtype), per_channel)
        return ops.cast(x, self.compute_dtype)

    @staticmethod
    def _means(x: keras.KerasTensor, groups: int) -> keras.KerasTensor:
        for axis in reversed(range(1, len(x.shape))):
            if axis != groups:
                x = ops.mean(x, axis=axis, keepdims=True)
        return x


class _Standardized:
    """Convolution whose kernel is standardised per filter in float32 before use.

    Source: arXiv 1903.10520, equation 11; the epsilon is that of BiT (arXiv 1912.11370).
    """

    epsilon = 1e-8

    def convolution_op(self, inputs: keras.KerasTensor, kernel: keras.KerasTensor) -> keras.KerasTensor:
        weights = ops.cast(kernel, "float32")
        mean, variance = ops.moments(weights, axes=list(range(len(weights.shape) - 1)), keepdims=True)
        standardized = (weights - mean) / ops.sqrt(variance + self.epsilon)
        return super().convolution_op(inputs, ops.cast(standardized, kernel.dtype))  # type: ignore[misc]  # a mixin


@register
class StandardizedConv1D(_Standardized, keras.layers.Conv1D):
    """`Conv1D` with weight standardisation; see `StandardizedConv2D`."""


@register
class StandardizedConv2D(_Standardized, keras.layers.Conv2D):
    """`Conv2D` whose kernel is standardised per filter before use; same weights, same arguments."""


@register
class StandardizedConv3D(_Standardized, keras.layers.Conv3D):
    """`Conv3D` with weight standardisation; see `StandardizedConv2D`."""


def standardized_conv(rank: int) -> Any:
    """Return the layer class for a convolution with weight standardisation over 1, 2 or 3 spatial axes."""
    return {1: StandardizedConv1D, 2: StandardizedConv2D, 3: StandardizedConv3D}[rank]
