"""Layers for any rank and layout: convolution, norm, activation and pooling are bound once, in a `LayerKit`."""

from dataclasses import dataclass
from functools import cached_property

import keras
from keras import layers

from ..layers import BlurPool, GroupNormalization, InfinityPad, standardized_conv


def conv_initializer():
    """He's normal by outgoing connections: it keeps the variance of the gradient; torchvision, timm and the paper use it.

    A new one for each layer, since one initializer draws the same numbers every time.
    """
    return keras.initializers.VarianceScaling(2.0, "fan_out", "untruncated_normal")


@dataclass(frozen=True)
class LayerKit:
    """The layers of one model, with everything bound that its blocks have in common.

    Args:
        rank: spatial axes: 1, 2 or 3.
        data_format: `"channels_last"` or `"channels_first"`; None is Keras' setting.
        dtype: dtype or policy of all layers; None is Keras' setting.
        padding: `"symmetric"` or `"same"`, see `ResNetConfig`.
        norm: `"batch"` or `"group"`.
        norm_groups: of a group norm.
        norm_epsilon: added to the variance.
        norm_momentum: of moving statistics, Keras style.
        activation: any name Keras knows.
        weight_standardization: standardise convolution kernels per filter.
    """

    rank: int = 2
    data_format: str | None = None
    dtype: str | None = None
    padding: str = "symmetric"
    norm_kind: str = "batch"
    norm_groups: int = 32
    norm_epsilon: float = 1e-5
    norm_momentum: float = 0.9
    activation: str = "relu"
    weight_standardization: bool = False

    @classmethod
    def of(cls, config, data_format=None, dtype=None):
        """The kit of a `ResNetConfig`."""
        return cls(
            rank=config.rank,
            data_format=data_format,
            dtype=dtype,
            padding=config.padding,
            norm_kind=config.norm,
            norm_groups=config.norm_groups,
            norm_epsilon=config.norm_epsilon,
            norm_momentum=config.norm_momentum,
            activation=config.activation,
            weight_standardization=config.weight_standardization,
        )

    @cached_property
    def layout(self):
        """The data format in force."""
        return self.data_format or keras.config.image_data_format()

    @property
    def axis(self):
        """The channel axis."""
        return -1 if self.layout == "channels_last" else 1

    def ranked(self, name):
        """The Keras layer of this rank, e.g. `ranked("Conv")` is `Conv2D`."""
        return getattr(layers, f"{name}{self.rank}D")

    def conv(self, x, filters, kernel, *, stride=1, dilation=1, groups=1, bias=False, zero=False, activation=None, name):
        """A convolution; at stride 2 padded like torch (one zero on either side), where Keras pads one side only.

        Raises:
            ValueError: `groups` does not divide the filters or the channels.
        """
        for what, count in (("filters", filters), ("channels", x.shape[self.axis])):
            if count % groups:
                raise ValueError(f"`groups` must divide the {what} ({count}), got {groups}")
        symmetric = self.padding == "symmetric" and stride > 1 and kernel > 1
        if symmetric:
            x = self.ranked("ZeroPadding")(kernel // 2, data_format=self.layout, dtype=self.dtype, name=f"{name}_pad")(x)
        layer = standardized_conv(self.rank) if self.weight_standardization else self.ranked("Conv")
        return layer(
            filters,
            kernel,
            strides=stride,
            dilation_rate=dilation,
            groups=groups,
            padding="valid" if symmetric else "same",
            use_bias=bias,
            activation=activation,
            kernel_initializer="zeros" if zero else conv_initializer(),
            data_format=self.layout,
            dtype=self.dtype,
            name=name,
        )(x)

    def norm(self, x, *, zero=False, name):
        """A batch or group norm; `zero` starts its scale at 0.

        Raises:
            ValueError: the groups of a group norm do not divide the channels.
        """
        gamma = "zeros" if zero else "ones"
        common = {"axis": self.axis, "epsilon": self.norm_epsilon, "gamma_initializer": gamma, "dtype": self.dtype, "name": name}
        if self.norm_kind == "batch":
            return layers.BatchNormalization(momentum=self.norm_momentum, **common)(x)
        if x.shape[self.axis] % self.norm_groups:
            raise ValueError(f"`norm_groups` must divide the channels ({x.shape[self.axis]}), got {self.norm_groups}")
        return GroupNormalization(groups=self.norm_groups, **common)(x)

    def act(self, x, *, name):
        """The activation."""
        return layers.Activation(self.activation, dtype=self.dtype, name=name)(x)

    def norm_act(self, x, suffix, *, name):
        """Norm and activation, named `{name}_norm{suffix}` and `{name}_act{suffix}`."""
        return self.act(self.norm(x, name=f"{name}_norm{suffix}"), name=f"{name}_act{suffix}")

    def pool(self, kind, x, size, stride, *, padding="same", name):
        """`"Max"` or `"Average"` pooling; the average leaves padded places out of the count, as torch's `ceil_mode` does."""
        pooling = self.ranked(f"{kind}Pooling")
        return pooling(size, stride, padding, data_format=self.layout, dtype=self.dtype, name=name)(x)

    def dense_average(self, x, *, name):
        """2×2 average at stride 1: zeros at the far side count, as in timm's dilated D shortcuts, where Keras leaves them out."""
        far = (0, 1) if self.rank == 1 else ((0, 1),) * self.rank
        x = self.ranked("ZeroPadding")(far, data_format=self.layout, dtype=self.dtype, name=f"{name}_pad")(x)
        return self.pool("Average", x, 2, 1, padding="valid", name=name)

    def blur(self, x, *, name):
        """Blur and subsample by 2."""
        return BlurPool(data_format=self.layout, dtype=self.dtype, name=name)(x)

    def max_pool(self, x, *, zeros=False, antialias=False, name):
        """The stem's 3×3 max pool at stride 2, padded on both sides, where Keras' `same` pads one side on even sizes.

        Args:
            zeros: pad with zeros and not with −∞. Where all values are ≥ 0 the two agree, and zeros are cheaper to export.
            antialias: pool at stride 1, then blur.
        """
        if antialias:
            return self.blur(self.pool("Max", x, 3, 1, name=name), name=f"{name}_blur")
        common = {"data_format": self.layout, "dtype": self.dtype, "name": f"{name}_pad"}
        x = self.ranked("ZeroPadding")(1, **common)(x) if zeros else InfinityPad(**common)(x)
        return self.pool("Max", x, 3, 2, padding="valid", name=name)

    def global_pool(self, kind, x, *, keepdims=False, name):
        """`"Average"` or `"Max"` over all positions."""
        pooling = self.ranked(f"Global{kind}Pooling")
        return pooling(data_format=self.layout, keepdims=keepdims, dtype=self.dtype, name=name)(x)

    def squeeze_excite(self, x, squeeze, *, name):
        """Channels weighted by what the whole map holds (arXiv 1709.01507, section 3)."""
        gate = self.global_pool("Average", x, keepdims=True, name=f"{name}_se_pool")
        plain = LayerKit(self.rank, self.layout, self.dtype)
        gate = plain.conv(gate, squeeze, 1, bias=True, name=f"{name}_se_fc1")
        gate = layers.Activation("relu", dtype=self.dtype, name=f"{name}_se_act")(gate)
        gate = plain.conv(gate, x.shape[self.axis], 1, bias=True, name=f"{name}_se_fc2")
        gate = layers.Activation("sigmoid", dtype=self.dtype, name=f"{name}_se_gate")(gate)
        return layers.Multiply(dtype=self.dtype, name=f"{name}_se_scale")([x, gate])
