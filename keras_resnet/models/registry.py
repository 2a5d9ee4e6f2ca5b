"""Names to models: the built-in variants and those that other packages declare."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import importlib.metadata
import inspect
import os
import typing
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import keras

from ..checks import nearest
from ..modelcard import card
from ..weights.matching import WeightsMismatch
from ..weights.sources import OWN, all_sources, packaged
from ..zoo.assembly import BuildOptions, feature_info
from ..zoo.config import Config, config_from_dict
from ..zoo.counting import count
from ..zoo.variants import NOTES, VARIANTS, slim_vgg
from .build import build, outline
from .pretrained import check_variant, fill, find_weights, fitting_variant, kept_classes, preprocessing_or_warn

if TYPE_CHECKING:
    from ..weights.sources import WeightSource


ENTRY_POINT_GROUP = "keras_resnet.models"


@dataclass(frozen=True)
class Plugin:
    """What another package adds to the zoo: the object its entry point in the group `keras_resnet.models` names.

    Args:
        models: Name -> `ResNetConfig` or `VGGConfig`.
        sources: Name -> `WeightSource`, for `weights=`.
    """

    models: dict[str, Config] = field(default_factory=dict)
    sources: dict[str, WeightSource] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelInfo:
    """What `model_info` reports; sizes come from a walk over the built layers.

    Args:
        name: Name of the model.
        config: Its architecture.
        trainable: Trainable parameters.
        total: Parameters with moving statistics.
        macs: Multiply-adds at `input_shape`.
        input_shape: Without batch.
        features: Stage outputs, see `feature_info`.
        owner: Package that declares the variant, None for a model that was passed in.
    """

    name: str
    config: Config | None
    trainable: int
    total: int
    macs: int | None
    input_shape: tuple[int | None, ...]
    features: list[dict[str, Any]]
    owner: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        config = self.config.to_dict() if self.config else None
        return {**dataclasses.asdict(self), "config": config, "input_shape": list(self.input_shape)}


def list_models(pattern: str = "*") -> list[str]:
    """Return the names of all variants that match a pattern, sorted, including those of plug-ins.

    Args:
        pattern: Shell-style pattern, e.g. `"resnet*"`. Default: all.
    """
    return sorted(fnmatch.filter(catalogue(), pattern))


@functools.cache
def catalogue() -> dict[str, tuple[Config, str | None]]:
    """Return `{name: (config, owner)}` of every variant.

    Raises:
        ValueError: Two owners declare one name.
    """
    found = {name: (config, "keras_resnet") for name, config in VARIANTS.items()}
    for owner, plugin in plugins():
        for name, config in plugin.models.items():
            if name in found:
                raise ValueError(f"model {name!r} is declared by {found[name][1]} and by {owner}; one of them must rename it")
            found[name] = (config, owner)
    return found


@functools.cache
def plugins() -> tuple[tuple[str, Plugin], ...]:
    """Return `(owner, Plugin)` of every installed entry point. One that cannot be imported is left out with a warning."""
    found = []
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        owner = entry.dist.name if entry.dist else entry.value
        try:
            plugin = entry.load()
        except Exception as error:
            warnings.warn(f"models of {owner} are left out: {entry.value} cannot be imported ({error})", stacklevel=2)
            continue
        if not isinstance(plugin, Plugin):
            raise ValueError(f"entry point {entry.value} of {owner} must be a keras_resnet.Plugin, got {type(plugin).__name__}")
        found.append((owner, plugin))
    return tuple(found)


def config_of(name: str) -> Config:
    """Return the config of a variant. VGGs of any width have one, e.g. `vgg16_w16`, although only some are listed.

    Raises:
        ValueError: There is no such variant; the message names similar ones.
    """
    models = catalogue()
    if name not in models and (slim := slim_vgg(name)) is not None:
        return slim
    if name not in models:
        hint = nearest(name, models) or ";"
        raise ValueError(f"unknown model {name!r}{hint} `list_models()` has all {len(models)}")
    return models[name][0]


def create_model(
    name: str | Config, /, *, weights: str | os.PathLike[str] | None = None, num_classes: int | None = None, **changes: Any
) -> keras.Model:
    """Build a variant of the zoo by its name. Unlike the functions of keras.applications, it makes random weights by default.

    Args:
        name: A name from `list_models()`, or a config.
        weights: A file (`open_weights` lists the formats), a name from `list_weights()`, or the tag of weights in this package
            (`"cifar10"`). Preprocessing, labels and card come with them. Default None: random weights.
        num_classes: Number of logits; None is the weights' own number, or else the variant's. `classes` is the same. Where the
            weights have another number, the backbone keeps its weights and the classifier starts fresh, except for classes whose
            names are both in `labels` and in the card of the weights.
        **changes: Fields of the config (`drop_path=0.1`, `output_stride=8`, `head="pool"` …) and of `BuildOptions`
            (`include_top`, `pooling`, `input_shape`, `input_tensor`, `preprocessing`, `features_only`, `name` …).

    Returns:
        A Functional `keras.Model`, uncompiled: pixels 0–255 in, float32 logits out.

    Raises:
        ValueError: A name or argument is unknown, or values or weights do not fit; the message says how to fix it.
        FileNotFoundError: The file of weights does not exist.
        ConnectionError: The weights cannot be downloaded.

    Example:
        >>> model = keras_resnet.create_model("resnet20", weights="cifar10")
        >>> model = keras_resnet.create_model("resnet50", num_classes=5, drop_path=0.1)
    """
    config = name if isinstance(name, Config) else config_of(name)
    known_as = name if isinstance(name, str) else config.family
    fields, options = split_arguments(config, changes)
    num_classes = fields.pop("num_classes", None) if num_classes is None else num_classes
    options = {"name": known_as, **{key: value for key, value in options.items() if (key, value) != ("preprocessing", None)}}
    pretrained = None if weights is None else find_weights(weights, known_as, weight_sources())
    classes = num_classes if num_classes is not None else pretrained and pretrained.num_classes(config.replace(**fields))
    config = config.replace(**fields) if classes is None else config.replace(**fields, num_classes=classes)
    if pretrained is None:
        return build(config, **options)
    try:
        check_variant(known_as, config, pretrained, fields)
        if options.get("include_preprocessing", True) and "preprocessing" not in options:
            options["preprocessing"] = preprocessing_or_warn(pretrained)
        labels = pretrained.labels if len(pretrained.labels or ()) == config.num_classes else None
        known = {"image": pretrained.image, "source": pretrained.describe(), "labels": labels}
        model = build(config, **{**known, **options})
        kept = kept_classes(pretrained.labels, options.get("labels"))
        fill(model, config, pretrained, fresh_head=num_classes is not None, kept_classes=kept)
    except WeightsMismatch as error:
        raise WeightsMismatch(f"{error}{_fitting(pretrained, known_as, fields)}") from error
    return model


def _fitting(pretrained, name, fields):
    """The end of a message about weights that do not fit: a variant that they do fit, found by trying."""
    configs = {}
    for other, (config, _) in catalogue().items():
        own = {item.name for item in dataclasses.fields(config)}
        try:
            changed = config.replace(**{key: value for key, value in fields.items() if key in own})
            configs[other] = changed.replace(num_classes=pretrained.num_classes(changed) or changed.num_classes)
        except ValueError:  # the fields do not go with this variant
            continue
    found = fitting_variant(pretrained, name, configs)
    return f"; it fits {found!r}" if found else ""


@functools.cache
def weight_sources() -> dict[str, WeightSource]:
    """Return `{name: WeightSource}`, including those of plug-ins."""
    return all_sources(plugins())


def list_weights(pattern: str = "*") -> list[str]:
    """Return the names that `weights=` takes in addition to files, e.g. `"torchvision/resnet50.IMAGENET1K_V2"`.

    Args:
        pattern: Shell-style pattern, e.g. `"*/resnet50*"`. Default: all, including packaged weights.
    """
    own = (f"{OWN}/{model}.{tag}" for model, tag in packaged())
    return sorted(fnmatch.filter([*weight_sources(), *own], pattern))


def split_arguments(config: Config, changes: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return `(config fields, build options)` among keyword arguments.

    Raises:
        ValueError: An argument is neither.
    """
    field_names = {item.name for item in dataclasses.fields(config)}
    option_names = {item.name for item in dataclasses.fields(BuildOptions)}
    changes = dict(changes)
    if "classes" in changes:
        changes["num_classes"] = changes.pop("classes")
    for key in changes:
        if key not in field_names | option_names:
            hint = nearest(key, field_names | option_names)
            raise ValueError(f"unknown argument `{key}` for a {config.family} model{hint}")
    if channels := _channels(changes):
        if changes.setdefault("channels", channels) != channels:
            raise ValueError(f"`channels` is {changes['channels']}, but the input has {channels}; give one of them")
    fields = {key: value for key, value in changes.items() if key in field_names}
    return fields, {key: value for key, value in changes.items() if key in option_names}


def _channels(options):
    """The number of channels that the build options ask for, or None if they leave it to the variant."""
    tensor, shape = options.get("input_tensor"), options.get("input_shape")
    shape = tuple(tensor.shape[1:]) if tensor is not None else shape
    first = (options.get("data_format") or keras.config.image_data_format()) == "channels_first"
    return shape[0 if first else -1] if shape and isinstance(shape, tuple | list) else None


def model_info(model: str | keras.Model, **changes: Any) -> ModelInfo:
    """Count the parameters and multiply-adds of a variant or a model, and list its stage outputs.

    Args:
        model: A name from `list_models()`, or a Keras model.
        **changes: Arguments as in `create_model`, for a name.

    Returns:
        `ModelInfo`.
    """
    if isinstance(model, keras.Model):
        known = card(model)
        config = config_from_dict(known.config) if known and known.config else None
        name, owner, shape = (known.name if known else model.name), None, tuple(model.inputs[0].shape[1:])
    else:
        name, owner = model, (catalogue()[model][1] if model in catalogue() else None)
        config = config_of(name)
        fields, options = split_arguments(config, changes)
        model = outline(config.replace(**fields), **options)
        config, shape = config_from_dict(card(model).config), tuple(model.inputs[0].shape[1:])
    counts = count(model)
    features = feature_info(config) if config else []
    return ModelInfo(name, config, counts.trainable, counts.total, counts.macs, shape, features, owner)


def constructor(name: str) -> Callable[..., keras.Model]:
    """Return the constructor of a variant, which is what `keras_resnet.resnet50` is.

    Args:
        name: A name from `list_models()`.

    Returns:
        Function that takes the arguments of `create_model`; its signature shows them with the defaults of the variant.
    """
    signature = inspect.Signature([*parameters(config_of(name))], return_annotation=keras.Model)

    def build(*, weights: str | os.PathLike[str] | None = None, num_classes: int | None = None, **changes: Any) -> keras.Model:
        return create_model(name, weights=weights, num_classes=num_classes, **changes)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"Build `{name}`{': ' + NOTES[name] if name in NOTES else ''}. Arguments as in `create_model`."
    build.__signature__ = signature  # type: ignore[attr-defined]
    return build


def parameters(config: Config) -> Iterator[inspect.Parameter]:
    """Yield the keyword arguments that `create_model` takes for a variant, with their types and defaults."""
    kinds = typing.get_type_hints(BuildOptions) | typing.get_type_hints(type(config))
    options = [(item.name, kinds[item.name], item.default) for item in dataclasses.fields(BuildOptions)]
    fields = [(item.name, kinds[item.name], getattr(config, item.name)) for item in dataclasses.fields(config)]
    fields = [field for field in fields if field[0] != "num_classes"]
    # None is the preprocessing that belongs to the weights.
    options = [(name, kind | None, None) if name == "preprocessing" else (name, kind, default) for name, kind, default in options]
    first = [("weights", str | os.PathLike[str] | None, None), ("num_classes", int | None, None)]
    for name, kind, default in [*first, *options, *fields]:
        yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
