"""What all families have around their backbone: input, card, preprocessing, head, named stage outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import keras
from keras import layers

from ..checks import positive_integer, sides_and_channels
from ..layers import Card
from ..modelcard import ModelCard, check_labels, preprocessing_card
from ..preprocessing import Preprocessing
from .config import ResNetConfig, VGGConfig
from .plan import block_plans

if TYPE_CHECKING:
    from ..blocks.kit import LayerKit
    from .config import Config


@dataclass(frozen=True)
class BuildOptions:
    """How a network is built, apart from what it is; names mean what they mean in keras.applications.

    Args:
        include_top: Whether the classifier is built. Without it the output is the last feature map.
        pooling: Pooling of the last feature map without a top: None, `"avg"` or `"max"` over all positions.
        input_shape: Shape without the batch. Default: the published size with a top, any size without.
        input_tensor: Keras tensor to build on.
        preprocessing: Mode or numbers of the first layer, which takes pixels 0–255, see `Preprocessing`.
        include_preprocessing: Whether that layer is built. Without it the model takes normalised input.
        features_only: True, or names of stages (`"stem"`, `"stage1"` …): the model returns a dict of these feature maps.
        data_format: `"channels_last"` or `"channels_first"`; None is Keras' setting. On a CPU TensorFlow needs oneDNN for the
            latter (`TF_ENABLE_ONEDNN_OPTS=1`, where it is not on by itself).
        dtype: Dtype or policy of all layers but card, preprocessing and logits, which stay float32; None is Keras' setting.
        name: Name of the model.
        labels: Class names in the order of the logits, for the card.
        source: The weights' own card, for the card.
        image: How an image file becomes the input (`size`, `resize`, `interpolation`), for the card.
    """

    include_top: bool = True
    pooling: str | None = None
    input_shape: tuple[int | None, ...] | None = None
    input_tensor: keras.KerasTensor | None = None
    preprocessing: str | dict[str, Any] = "none"
    include_preprocessing: bool = True
    features_only: bool | str | Sequence[str] = False
    data_format: str | None = None
    dtype: str | keras.DTypePolicy | None = None
    name: str | None = None
    labels: Sequence[str] | None = None
    source: dict[str, Any] | None = None
    image: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.pooling not in (None, "avg", "max"):
            raise ValueError(f'`pooling` must be None, "avg" or "max", got {self.pooling!r}')
        shape = self.input_shape
        if not isinstance(shape, tuple | list | None):
            raise ValueError(f"`input_shape` must be a tuple of whole numbers, or None for dynamic sizes, got {shape!r}")
        for index, size in enumerate(shape or ()):
            if size is not None:
                positive_integer(f"input_shape[{index}]", size)
        if self.data_format not in (None, "channels_last", "channels_first"):
            raise ValueError(f'`data_format` must be "channels_last" or "channels_first", got {self.data_format!r}')


def entrance(config: Config, options: BuildOptions) -> tuple[keras.KerasTensor, keras.KerasTensor]:
    """Build the input of a model, card and preprocessing, and return what the backbone takes.

    Returns:
        `(inputs, x)`.

    Raises:
        ValueError: The input has another rank, unknown channels, or fewer pixels than the stride of the backbone.
    """
    data_format = options.data_format or keras.config.image_data_format()
    if options.input_tensor is None:
        x = inputs = keras.Input(_input_shape(config, options, data_format), dtype="float32", name="images")
    else:
        x = options.input_tensor
        inputs = keras.utils.get_source_inputs(x)
    sides = _checked_sides(config, tuple(x.shape), data_format)
    mode = options.preprocessing if options.include_preprocessing else "none"
    layer = Preprocessing.of(mode, data_format=data_format, name="preprocessing")
    image = _image(options.image or {}, sides)
    card = ModelCard(
        name=options.name or config.family,
        config=config.to_dict(),
        preprocessing={**preprocessing_card(**image), **layer.describe()},
        labels=None if options.labels is None else check_labels(options.labels, config.num_classes),
        weights=options.source,
    )
    return inputs, layer(Card(card.to_dict(), name="card")(x))


def finish(
    config: Config,
    options: BuildOptions,
    inputs: keras.KerasTensor,
    x: keras.KerasTensor,
    features: dict[str, keras.KerasTensor],
    kit: LayerKit,
    classifier: Callable[[keras.KerasTensor], keras.KerasTensor],
) -> keras.Model:
    """Build the model on its backbone: stage outputs, a feature map, pooled features or logits.

    Args:
        config: The architecture.
        options: `BuildOptions`.
        inputs: What `entrance` gave.
        x: Output of the backbone.
        features: Name of stage -> feature map.
        kit: `LayerKit`.
        classifier: Function of `x` that builds the head up to the logits.
    """
    if options.features_only:
        outputs = _chosen(features, options.features_only)
    elif options.include_top:
        outputs = classifier(x)
    elif options.pooling:
        outputs = kit.global_pool({"avg": "Average", "max": "Max"}[options.pooling], x, name=f"{options.pooling}_pool")
    else:
        outputs = x
    return keras.Model(inputs, outputs, name=options.name or config.family)


def logits(x: keras.KerasTensor, num_classes: int) -> keras.KerasTensor:
    """Return the classifier; float32 under any policy, since half precision would tie close classes."""
    return layers.Dense(num_classes, dtype="float32", name="predictions")(x)


def feature_info(config: Config) -> list[dict[str, Any]]:
    """Channels and stride of each stage output, in order; like timm's `feature_info`.

    Args:
        config: A `ResNetConfig` or `VGGConfig`.

    Returns:
        List of dicts: `name` (as in `features_only`), `channels`, `reduction` (input pixels per feature pixel).

    Raises:
        TypeError: `config` is something else.
    """
    if isinstance(config, VGGConfig):
        widths = enumerate(config.widths, start=1)
        return [{"name": f"stage{k}", "channels": config.scaled(width), "reduction": 2**k} for k, width in widths]
    if not isinstance(config, ResNetConfig):
        raise TypeError(f"`config` must be a ResNetConfig or a VGGConfig, got {type(config).__name__}")
    rows = [{"name": "stem", "channels": config.stem_widths[-1], "reduction": config.stem_stride}]
    reduction = config.stem_reduction
    for block in block_plans(config):
        reduction *= block.stride
        if block.closes_stage:
            rows.append({"name": f"stage{block.stage}", "channels": block.filters, "reduction": reduction})
    return rows


def _image(known, sides):
    """The card's entry on image files: at another size than the weights' own the crop keeps its share of the image."""
    if len(sides) != 2 or None in sides:
        return {"size": None, **known}
    size, resize = known.get("size"), known.get("resize")
    if size and resize:
        resize = round(resize * min(sides) / min(size))
    return {**known, "size": list(sides), "resize": resize}


def _chosen(features, wanted):
    if wanted is True:
        return dict(features)
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    if unknown := [name for name in names if name not in features]:
        raise ValueError(f"`features_only` may name {', '.join(features)}, got {', '.join(map(str, unknown))}")
    return {name: features[name] for name in names}


def _input_shape(config, options, data_format):
    if options.input_shape is not None:
        return tuple(options.input_shape)
    side = config.input_size if options.include_top and not options.features_only else None
    sides = (side,) * config.rank
    return (*sides, config.channels) if data_format == "channels_last" else (config.channels, *sides)


def _checked_sides(config, shape, data_format):
    """The spatial sides of an input, if the network takes it."""
    given = shape[1:]
    if len(given) != config.rank + 1:
        raise ValueError(f"`input_shape` must have {config.rank + 1} entries ({config.rank} sides and the channels), got {given}")
    sides, channels = sides_and_channels(shape, data_format)
    if channels is None:
        raise ValueError(f"`input_shape` must give the number of channels ({data_format}), got {given}")
    if any(side is not None and side < config.smallest_side for side in sides):
        raise ValueError(f"`input_shape` must have sides of at least {config.smallest_side}, got {given}")
    return sides
