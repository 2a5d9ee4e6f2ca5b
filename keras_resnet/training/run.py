"""The description of a run: groups of options, made of a recipe and changes to it, saved as YAML with the results."""

import dataclasses
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from ..checks import first_line, nearest
from . import options
from .options import TrainingError, check_kind, is_kind
from .recipes import RECIPES

__all__ = ["Run", "TrainingError"]

# The recipe of a run that starts from a pretrained model and does not say how to train it.
FINE_TUNING = "finetune"
RENAMED = {"trunk_lr_multiplier": "backbone_lr_multiplier"}
# Options that a resumed run may change: where and how steps are run, not what they compute.
FREE = (
    "model", "data", "devices", "workers", "index", "lost_worker", "save_every", "tensorboard", "jit", "fused_norm",
    "steps_per_execution", "cache", "data_path", "tta",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A training run. A recipe changes the defaults; options that are given as well win.

    Make one with `Run.of`, which takes all options by their names: `Run.of("goyal2017", epochs=20, batch_size=512)`. Every
    option can also be read from the run itself: `run.epochs` is `run.optimization.epochs`.

    Args:
        recipe: Name of the recipe that it was made of, or None.
        network: The model and its weights.
        dataset: The data.
        optimization: Optimiser, schedule, loss.
        augmentation: What is done to training images and labels.
        growing: Growth while training, frozen epochs, learning rates by role.
        distribution: Devices and machines.
        keeping: Seed, checkpoints, logs.

    Raises:
        TrainingError: Options that contradict each other; the message names them.
    """

    recipe: str | None = None
    network: options.Network = field(default_factory=options.Network)
    dataset: options.Dataset = field(default_factory=options.Dataset)
    optimization: options.Optimization = field(default_factory=options.Optimization)
    augmentation: options.Augmentation = field(default_factory=options.Augmentation)
    growing: options.Growing = field(default_factory=options.Growing)
    distribution: options.Distribution = field(default_factory=options.Distribution)
    keeping: options.Keeping = field(default_factory=options.Keeping)

    def __post_init__(self) -> None:
        self._check_epochs()
        self._check_optimizer()
        self._check_processes()

    def _check_epochs(self) -> None:
        epochs, initial = self.epochs, self.initial_epoch
        if initial >= epochs:
            raise TrainingError(f"`initial_epoch` must be below `epochs` ({epochs}), got {initial}")
        if self.frozen_epochs > epochs:
            raise TrainingError(f"`frozen_epochs` must be at most `epochs` ({epochs}), got {self.frozen_epochs}")
        if self.warmup_epochs >= epochs:
            raise TrainingError(f"`warmup_epochs` must be below `epochs` ({epochs}), got {self.warmup_epochs}")
        for event in self.growth:
            if not _grows(event, epochs):
                raise TrainingError(f"`growth` holds (epoch below {epochs}, insertion point, blocks), got {event!r}")
            if event[0] < initial:
                raise TrainingError(
                    f"`growth` has an event before `initial_epoch` ({initial}): {event!r}; give the grown model, and leave it out"
                )
        if list(self.milestones) != sorted(self.milestones) or any(epoch < 0 for epoch in self.milestones):
            raise TrainingError(f"`milestones` must be epochs in their order, got {self.milestones!r}")

    def _check_optimizer(self) -> None:
        if self.optimizer == "muon" and not self.momentum:
            raise TrainingError("`momentum` must be above 0 with the optimizer 'muon', got 0")
        if self.alternate_flips and not self.flip:
            raise TrainingError("`alternate_flips` needs `flip`")

    def _check_processes(self) -> None:
        check_addresses(self.workers, "`workers`")
        if self.index and not self.workers:
            raise TrainingError(f"`index` needs `workers`, got {self.index}")
        if self.workers and self.devices:
            raise TrainingError("`devices` cannot be combined with `workers`")
        if self.workers and not self.index < len(self.workers):
            raise TrainingError(f"`index` must be below the number of workers ({len(self.workers)}), got {self.index}")

    def __getattr__(self, name: str) -> Any:
        name = RENAMED.get(name, name)
        if name in GROUP_OF:
            return getattr(getattr(self, GROUP_OF[name]), name)
        raise AttributeError(f"a run has no option {name!r}")

    @classmethod
    def of(cls, recipe: str | None = None, **changes: Any) -> Self:
        """Make a run from a recipe and changes to it.

        Args:
            recipe: Name of a recipe. None takes the defaults, or the recipe for fine-tuning if the model is pretrained and
                neither optimiser nor learning rate nor schedule is given.
            **changes: Options by name.

        Raises:
            TrainingError: The recipe or an option is unknown, or a value is out of range; the message names it.
        """
        changes = _known(changes)
        if recipe is None and _is_pretrained(changes):
            recipe = FINE_TUNING
        fields = {}
        if recipe is not None:
            if not isinstance(recipe, str) or recipe not in RECIPES:
                raise TrainingError(f"unknown recipe {recipe!r}{nearest(recipe, RECIPES)}")
            fields = {key: value for key, value in RECIPES[recipe].items() if key != "source"}
        return cls._from(recipe, _merged(fields, changes))

    @classmethod
    def _from(cls, recipe: str | None, values: Mapping[str, Any]) -> Self:
        groups: dict[str, Any] = {
            name: kind(**{item.name: values[item.name] for item in dataclasses.fields(kind) if item.name in values})
            for name, kind in GROUPS.items()
        }
        return cls(recipe, **groups)

    def replace(self, **changes: Any) -> Self:
        """Return a run with some options changed; nothing is scaled to a new number of epochs, see `of`."""
        return self._from(self.recipe, {**self.options(), **_known(changes)})

    def options(self) -> dict[str, Any]:
        """Return all options by name."""
        return {name: getattr(self, name) for name in OPTIONS}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, by group."""
        return {
            "recipe": self.recipe,
            **{group: {k: _plain(v) for k, v in dataclasses.asdict(getattr(self, group)).items()} for group in GROUPS},
        }

    def essence(self) -> dict[str, Any]:
        """Return what a checkpoint and the run that resumes from it must agree on: all that matters except for rounding."""
        return {name: _plain(value) for name, value in self.options().items() if name not in FREE}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the run as YAML."""
        Path(path).write_text(_yaml().safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str], **changes: Any) -> Self:
        """Read a run from a YAML file: options by group, or flat as version 0.1 wrote them.

        Args:
            path: The YAML file. A `recipe` in it is applied before its options.
            **changes: Options by name, which override those of the file.

        Raises:
            TrainingError: There is no such file, it is not YAML, or an option is unknown.
        """
        yaml = _yaml()
        try:
            found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise TrainingError(f"{path} cannot be read: {first_line(error)}") from error
        if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
            raise TrainingError(f"{path} must hold `option: value` lines")
        flat = {}
        for key, value in found.items():
            flat |= value if key in GROUPS and isinstance(value, dict) else {key: value}
        recipe = changes.pop("recipe", None) or flat.pop("recipe", None)
        flat.pop("recipe", None)
        if not isinstance(recipe, str | None):
            raise TrainingError(f"`recipe` must be a string, got {recipe!r}")
        return cls.of(recipe, **_merged(_known(flat), _known(changes)))


GROUPS: dict[str, type[options.Options]] = {
    "network": options.Network,
    "dataset": options.Dataset,
    "optimization": options.Optimization,
    "augmentation": options.Augmentation,
    "growing": options.Growing,
    "distribution": options.Distribution,
    "keeping": options.Keeping,
}
OPTIONS: dict[str, dataclasses.Field] = {item.name: item for kind in GROUPS.values() for item in dataclasses.fields(kind)}
GROUP_OF: dict[str, str] = {item.name: group for group, kind in GROUPS.items() for item in dataclasses.fields(kind)}
CHOICES: dict[str, tuple[str, ...]] = {
    name: item.metadata["choices"] for name, item in OPTIONS.items() if item.metadata["choices"]
}


def _known(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options as YAML can hold them, by their present names.

    Raises:
        TrainingError: An unknown option, or a value of the wrong type.
    """
    known = {}
    for key, value in given.items():
        if key in RENAMED:
            warnings.warn(f"option {key!r} was renamed to {RENAMED[key]!r}", DeprecationWarning, stacklevel=4)
            key = RENAMED[key]
        if key not in OPTIONS:
            raise TrainingError(f"unknown option {key!r}{_similar(key)}")
        known[key] = _simple(value)
        check_kind(OPTIONS[key], known[key])
    return known


# What users of Keras' `fit` may type for an option, or expect to be one.
ELSEWHERE = {"lr": "learning_rate", "batch": "batch_size", "verbose": "quiet"}


def _similar(name: str) -> str:
    if name in ELSEWHERE:
        return f"; did you mean {ELSEWHERE[name]}?"
    near = nearest(name, OPTIONS)
    # A name of another thing is not a typing error: suggest only what is spelt nearly the same.
    return near if near and min(len(set(name) ^ set(option)) for option in OPTIONS if repr(option) in near) <= 3 else ""


def _is_pretrained(changes: Mapping[str, Any]) -> bool:
    """Whether a run starts from a trained model and leaves open how to train it."""
    trained = bool(changes.get("weights")) or str(changes.get("model", "")).endswith((".keras", ".h5", ".hdf5"))
    return trained and not {"optimizer", "learning_rate", "schedule", "base_batch"} & set(changes)


def _merged(fields: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` on top of `fields`; epochs within a run are parts of its whole, so a shorter run is the same one, faster."""
    fields = dict(fields)
    if "epochs" in changes and fields.get("epochs", 0) > 0:
        scale = changes["epochs"] / fields["epochs"]
        if "warmup_epochs" in fields:
            fields["warmup_epochs"] *= scale
        if fields.get("frozen_epochs"):
            fields["frozen_epochs"] = max(1, round(fields["frozen_epochs"] * scale))
        if "milestones" in fields:
            fields["milestones"] = tuple(value * scale for value in fields["milestones"])
    if changes.get("model_options") and fields.get("model_options"):
        changes = {**changes, "model_options": {**fields["model_options"], **changes["model_options"]}}
    return {**fields, **changes}


def _simple(value: Any) -> Any:
    """A value as YAML can hold it, lists as tuples: no numbers of NumPy, no paths."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_simple, value))
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if isinstance(value, np.generic) else value


def _plain(value: Any) -> Any:
    return [_plain(part) for part in value] if isinstance(value, (tuple, list)) else value


def _grows(event: Any, epochs: int) -> bool:
    """Whether an event of `growth` can be."""
    if not isinstance(event, tuple) or len(event) != 3:
        return False
    return is_kind(event[0], int) and is_kind(event[2], int) and 0 <= event[0] < epochs and event[2] >= 1


def check_addresses(addresses: tuple[str, ...] | list[str], name: str) -> None:
    """Refuse addresses that are not `host:port`, or not all different; TensorFlow would wait for them forever."""
    for address in addresses:
        host, _, port = str(address).rpartition(":")
        if not host or not port.isdecimal() or len(port) > 5 or not 0 < int(port) < 2**16 or address.split() != [address]:
            raise TrainingError(f"{name} must be host:port, with a port from 1 to 65535, got {address!r}")
    if len(set(addresses)) < len(addresses):
        raise TrainingError(f"{name} must all be different, got {', '.join(addresses)}")


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise TrainingError("PyYAML is not installed: pip install 'keras-resnet-export[train]'") from error
    return yaml
