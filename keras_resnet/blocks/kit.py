"""Keras layers for any rank and data format, in the style of one network."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import keras
from keras import layers

from ..deprecated import old_arguments
from ..layers import Affine, BlurPool, Dirac, GroupNormalization, InfinityPad, standardized_conv
from .branches import Act, Blur, ConvPlan, Dropout, MaxPool, Norm, Scale, Shift, Step
from .style import BlockStyle, LayerStyle


def conv_initializer() -> keras.initializers.Initializer:
    """Return He's normal initializer by outgoing connections, which torchvision, timm and the paper use.

    It keeps the variance of the gradients. Each layer needs its own, since one initializer draws the same numbers every time.
    """
    return keras.initializers.VarianceScaling(2.0, "fan_out", "untruncated_normal")


def apply(parts: Iterable[keras.layers.Layer], x: keras.KerasTensor) -> keras.KerasTensor:
    """Call layers one after the other."""
    for part in parts:
        x = part(x)
    return x


# Arguments that version 0.1 had, and the fields of `BlockStyle` that they are now.
_STYLE = {name: name for name in ("rank", "padding", "norm_groups", "norm_epsilon", "norm_momentum", "activation")}
_STYLE |= {"norm_kind": "norm", "weight_standardization": "weight_standardization"}


def _with_style(arguments: dict[str, Any]) -> tuple[dict[str, Any], str] | None:
    style = {_STYLE[name]: value for name, value in arguments.items() if name in _STYLE}
    if not style or "style" in arguments:
        return None
    kept = {name: value for name, value in arguments.items() if name not in _STYLE}
    shown = ", ".join(f"{name}={value!r}" for name, value in style.items())
    return {"style": BlockStyle(**style), **kept}, f"these arguments of `LayerKit` are `style=BlockStyle({shown})` now"


@old_arguments(_with_style)
@dataclass(frozen=True)
class LayerKit:
    """Makes and applies the layers of one network.

    Args:
        style: What the layers have in common: a config, or a `BlockStyle`.
        data_format: `"channels_last"` or `"channels_first"`. Default: Keras' setting.
        dtype: Dtype or dtype policy of all layers. Default: Keras' setting.
    """

    style: LayerStyle = field(default_factory=BlockStyle)
    data_format: str | None = None
    dtype: object = None

    @cached_property
    def layout(self) -> str:
        """The data format in force."""
        return self.data_format or keras.config.image_data_format()

    @property
    def axis(self) -> int:
        """The channel axis."""
        return -1 if self.layout == "channels_last" else 1

    def ranked(self, name: str) -> type[keras.layers.Layer]:
        """Return the Keras layer of this rank: `ranked("Conv")` is `Conv2D` for images."""
        return getattr(layers, f"{name}{self.style.rank}D")

    # ------------------------------------------------------------ making layers

    def conv_layers(self, plan: ConvPlan, name: str, activation: str | None = None) -> list[keras.layers.Layer]:
        """Make a convolution; on vectors it is a dense layer.

        With a stride it is padded like torch's (one zero on either side), unless the style says `"same"`; Keras pads one side.

        Args:
            plan: Its sizes.
            name: Its name.
            activation: Activation that is part of the layer. Default: none.

        Returns:
            The convolution, after a layer that pads if that is needed.

        Raises:
            ValueError: It is a depthwise convolution of a rank for which Keras has no layer.
        """
        rank = self.style.rank
        if plan.is_depthwise and rank not in (1, 2):
            data = "3-D data" if rank else "vectors"
            raise ValueError(f'Keras has no depthwise convolution for {data}; use block "preact" or "bottleneck"')
        initializer = self._initializer(plan)
        common = {"use_bias": plan.bias, "activation": activation, "dtype": self.dtype, "name": name}
        if rank == 0:
            return [layers.Dense(plan.filters, kernel_initializer=initializer, **common)]
        symmetric = self.style.padding == "symmetric" and plan.stride > 1 and plan.kernel > 1
        common |= {
            "strides": plan.stride,
            "dilation_rate": plan.dilation,
            "padding": "valid" if symmetric else "same",
            "data_format": self.layout,
        }
        if plan.is_depthwise:
            conv = self.ranked("DepthwiseConv")(plan.kernel, depthwise_initializer=initializer, **common)
        else:
            kind = standardized_conv(rank) if self.style.weight_standardization else self.ranked("Conv")
            conv = kind(plan.filters, plan.kernel, groups=plan.groups, kernel_initializer=initializer, **common)
        if not symmetric:
            return [conv]
        pad = self.ranked("ZeroPadding")(plan.kernel // 2, data_format=self.layout, dtype=self.dtype, name=f"{name}_pad")
        return [pad, conv]

    def _initializer(self, plan: ConvPlan) -> object:
        """What the kernel of a convolution starts as."""
        if plan.initializer is not None:
            return plan.initializer
        is_dirac = self.style.initializer == "dirac" and plan.groups == 1 and plan.kernel % 2
        return Dirac() if is_dirac else conv_initializer()

    def norm_layer(self, channels: int, name: str, zero: bool = False) -> keras.layers.Layer:
        """Make a batch or group norm.

        Args:
            channels: Number of channels of its input.
            name: Its name.
            zero: Whether its scale γ starts at 0 instead of 1.

        Raises:
            ValueError: The groups of a group norm do not divide the channels.
        """
        style = self.style
        common = {
            "axis": self.axis,
            "epsilon": style.norm_epsilon,
            "scale": style.norm_scale,
            "gamma_initializer": "zeros" if zero else "ones",
            "dtype": self.dtype,
            "name": name,
        }
        if style.norm == "batch":
            return layers.BatchNormalization(momentum=style.norm_momentum, **common)
        if channels % style.norm_groups:
            raise ValueError(f"`norm_groups` must divide the channels ({channels}), got {style.norm_groups}")
        return GroupNormalization(groups=style.norm_groups, **common)

    def act_layer(self, name: str) -> keras.layers.Layer:
        """Make the activation."""
        return layers.Activation(self.style.activation, dtype=self.dtype, name=name)

    def blur_layer(self, name: str) -> keras.layers.Layer:
        """Make the layer that blurs and subsamples by 2."""
        return BlurPool(data_format=self.layout, dtype=self.dtype, name=name)

    def pool_layer(self, kind: str, size: int, stride: int, padding: str, name: str) -> keras.layers.Layer:
        """Make a `"Max"` or `"Average"` pooling, see `pool`."""
        pooling = self.ranked(f"{kind}Pooling")
        return pooling(size, stride, padding, data_format=self.layout, dtype=self.dtype, name=name)

    # ------------------------------------------------------------ applying layers

    def conv(
        self, x: keras.KerasTensor, filters: int, kernel: int, *, stride: int = 1, bias: bool = False,
        activation: str | None = None, name: str,
    ) -> keras.KerasTensor:  # fmt: skip
        """Apply a convolution, see `conv_layers`."""
        return apply(self.conv_layers(ConvPlan(filters, kernel, stride, bias=bias), name, activation), x)

    def fixed_conv(self, x: keras.KerasTensor, filters: int, kernel: int, *, name: str) -> keras.KerasTensor:
        """Apply a convolution that is not trained and does not pad."""
        common = {"use_bias": False, "trainable": False, "data_format": self.layout, "dtype": self.dtype, "name": name}
        return self.ranked("Conv")(filters, kernel, kernel_initializer=conv_initializer(), **common)(x)

    def norm(self, x: keras.KerasTensor, *, name: str) -> keras.KerasTensor:
        """Apply a norm."""
        return self.norm_layer(x.shape[self.axis], name)(x)

    def act(self, x: keras.KerasTensor, *, name: str) -> keras.KerasTensor:
        """Apply the activation."""
        return self.act_layer(name)(x)

    def norm_act(self, x: keras.KerasTensor, suffix: object, *, name: str) -> keras.KerasTensor:
        """Apply norm and activation, named `{name}_norm{suffix}` and `{name}_act{suffix}`."""
        return self.act(self.norm(x, name=f"{name}_norm{suffix}"), name=f"{name}_act{suffix}")

    def pool(
        self, kind: str, x: keras.KerasTensor, size: int, stride: int, *, padding: str = "same", name: str
    ) -> keras.KerasTensor:
        """Apply `"Max"` or `"Average"` pooling. The average does not count padded positions, as torch's `ceil_mode` does not."""
        return self.pool_layer(kind, size, stride, padding, name)(x)

    def dense_average(self, x: keras.KerasTensor, *, name: str) -> keras.KerasTensor:
        """Average 2×2 positions at stride 1.

        The padded zeros at the far side count, as in timm's dilated D shortcuts. Keras does not count them.
        """
        far = (0, 1) if self.style.rank == 1 else ((0, 1),) * self.style.rank
        x = self.ranked("ZeroPadding")(far, data_format=self.layout, dtype=self.dtype, name=f"{name}_pad")(x)
        return self.pool("Average", x, 2, 1, padding="valid", name=name)

    def blur(self, x: keras.KerasTensor, *, name: str) -> keras.KerasTensor:
        """Blur and subsample by 2."""
        return self.blur_layer(name)(x)

    def max_pool(self, x: keras.KerasTensor, *, zeros: bool = False, antialias: bool = False, name: str) -> keras.KerasTensor:
        """Apply the stem's 3×3 max pool at stride 2, padded on both sides; Keras' `same` pads one side on even sizes.

        Args:
            x: Feature map.
            zeros: Whether to pad with zeros instead of −∞. Where all values are ≥ 0 the two agree, and zeros are cheaper to
                export.
            antialias: Whether to pool at stride 1 and then blur.
            name: Name of the pooling layer.
        """
        if antialias:
            return self.blur(self.pool("Max", x, 3, 1, name=name), name=f"{name}_blur")
        common: dict[str, Any] = {"data_format": self.layout, "dtype": self.dtype, "name": f"{name}_pad"}
        x = self.ranked("ZeroPadding")(1, **common)(x) if zeros else InfinityPad(**common)(x)
        return self.pool("Max", x, 3, 2, padding="valid", name=name)

    def global_pool(self, kind: str, x: keras.KerasTensor, *, keepdims: bool = False, name: str) -> keras.KerasTensor:
        """Apply `"Average"` or `"Max"` pooling over all positions."""
        pooling = self.ranked(f"Global{kind}Pooling")
        return pooling(data_format=self.layout, keepdims=keepdims, dtype=self.dtype, name=name)(x)

    def squeeze_excite(self, x: keras.KerasTensor, squeeze: int, *, name: str) -> keras.KerasTensor:
        """Weight the channels by what the whole map contains (arXiv 1709.01507, section 3)."""
        plain = LayerKit(BlockStyle(rank=self.style.rank), self.layout, self.dtype)
        weights = self.global_pool("Average", x, keepdims=True, name=f"{name}_se_pool")
        weights = plain.conv(weights, squeeze, 1, bias=True, name=f"{name}_se_fc1")
        weights = layers.Activation("relu", dtype=self.dtype, name=f"{name}_se_act")(weights)
        weights = plain.conv(weights, x.shape[self.axis], 1, bias=True, name=f"{name}_se_fc2")
        weights = layers.Activation("sigmoid", dtype=self.dtype, name=f"{name}_se_gate")(weights)
        return layers.Multiply(dtype=self.dtype, name=f"{name}_se_scale")([x, weights])


def branch_layers(steps: Sequence[Step], channels: int, kit: LayerKit, name: str) -> list[keras.layers.Layer]:
    """Make the layers of a branch from its steps.

    Args:
        steps: The steps, in order.
        channels: Number of channels of the input.
        kit: Makes the layers.
        name: Prefix of the layers' names. Layers of one kind are numbered from 1: `{name}_conv1`, `{name}_conv2` …

    Returns:
        Keras layers to be called one after the other, not yet built.

    Raises:
        ValueError: There is no layer for a step, see `LayerKit`.
    """
    made, numbers = [], Counter()

    def numbered(part: str) -> str:
        numbers[part] += 1
        return f"{name}_{part}{numbers[part]}"

    for step in steps:
        match step:
            case ConvPlan():
                made += kit.conv_layers(step, numbered("conv" if kit.style.rank else "dense"))
                channels = step.filters
            case Norm(zero):
                made.append(kit.norm_layer(channels, numbered("norm"), zero))
            case Act(label):
                made.append(kit.act_layer(numbered(label)))
            case Shift():
                made.append(Affine(scale=None, shift=True, dtype=kit.dtype, name=numbered("shift")))
            case Scale(scale, initial, shift):
                made.append(Affine(scale, initial, shift, axis=kit.axis, dtype=kit.dtype, name=f"{name}_scale"))
            case Dropout(rate):
                made.append(layers.Dropout(rate, dtype=kit.dtype, name=f"{name}_dropout"))
            case Blur():
                made.append(kit.blur_layer(f"{name}_blur"))
            case MaxPool():
                made.append(kit.pool_layer("Max", 2, 2, "valid", numbered("pool")))
    return made
