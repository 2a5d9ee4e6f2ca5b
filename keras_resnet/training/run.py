"""What a training is: one frozen dataclass, from flags or YAML, saved beside the results."""

import dataclasses
import difflib
import math
import os
import typing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..hints import first_line
from .recipes import RECIPES

CHOICES = {
    "optimizer": ("sgd", "adamw", "lamb"),
    "schedule": ("constant", "step", "cosine", "one-cycle"),
    "loss": ("auto", "softmax", "sigmoid"),
    "precision": ("float32", "float64", "mixed_float16", "mixed_bfloat16"),
    "corrupt": ("fail", "skip"),
    "validate": ("auto", "test", "none"),
    "lost_worker": ("stop", "wait"),
}


KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    dict: "pairs of name and value",
    tuple: "a list",
}


class TrainingError(Exception):
    """A training cannot start or go on; the message says why and what to do."""

    exit_code = 2


@dataclass(frozen=True)
class Run:
    """A training run. A recipe changes the defaults; what is given beside it wins.

    Args:
        model: name of the zoo, or a `.keras` file.
        model_options: further arguments of `create_model`.
        weights: initial weights; None for random ones.
        data: `digits`, `cifar10`, `cifar100`, `tfds/NAME`, an `.npz`, a folder of images per class, or of TFRecord shards.
        data_path: for CIFAR the `.npz`, for TFDS the data folder; None lets Keras (TFDS) download.
        corrupt: damaged images end the run, or are named and left out.
        cache: hold image files in memory.
        holdout: training images held out for validation, to choose a recipe without the test set.
        validate: after every epoch: `"auto"` on the held-out images, or the test set if none are; `"test"`; `"none"`.
            The test set is measured once at the end in any case.
        recipe: a set of defaults with a name; --recipes lists them.
        image_size: side of the model's input; None is the data set's, or the model's own.
        epochs: passes over the training images.
        batch_size: images per step over all devices (global batch).
        accumulate: steps whose gradients are averaged for one update of the weights.
        learning_rate: for a global batch of `base_batch`; scaled linearly (arXiv 1706.02677).
        base_batch: batch size that `learning_rate` is meant for.
        optimizer: SGD with momentum, AdamW or LAMB.
        momentum: of SGD.
        nesterov: of SGD.
        schedule: of the learning rate, behind the warm-up; one-cycle has a rise of its own over 30 % of the run.
        milestones: epochs at which `"step"` multiplies the rate by `factor`.
        factor: of each of the milestones.
        warmup_epochs: epochs of linear warm-up from 0 (from the unscaled rate with `warmup_to_batch`).
        warmup_to_batch: warm up from the unscaled rate to the scaled one.
        weight_decay: with SGD added to the gradient (L2, as in the papers); with AdamW and LAMB decoupled. Gates, γ, β and
            biases are left out.
        clip_norm: largest global norm of the gradient, after the sum over replicas; 0 for none.
        loss: `"softmax"` (cross-entropy), `"sigmoid"` (binary cross-entropy per class, as in arXiv 2110.00476), or `"auto"`: the
            one that fits what the model returns.
        label_smoothing: share of a label that all classes get alike.
        shuffle: read training examples in a new order in every epoch.
        crop_padding: pixels around training images before a random crop of the model's size (CIFAR: 4).
        random_area: smallest share of a photograph's area that a random crop takes before it is resized (ImageNet: 0.08);
            photographs of several sizes get 0.25 where it is 0.
        flip: mirror training images in half of the cases.
        randaugment: RandAugment operations per image.
        magnitude: of those operations, 0 to 10.
        erasing: probability that a random rectangle is filled with noise.
        mixup: α of MixUp, 0 for none.
        cutmix: α of CutMix, 0 for none.
        small_crops: side of training crops in the beginning, as a share of the model's; 1 switches it off.
        small_epochs: share of the epochs with small crops.
        drop_path: probability to drop the deepest branch; None is the model's own.
        ema: momentum of an average of the weights, which is then validated and saved; 0 for none.
        gate_lr_multiplier: factor on the rate of gates.
        new_lr_multiplier: factor on the rate of grown blocks, apart from their gates.
        new_decay_multiplier: factor on the weight decay of grown blocks.
        frozen_epochs: epochs in which only grown blocks and the head learn, the trunk's batch norm in inference mode.
        trunk_lr_multiplier: factor on the trunk's rate after that.
        growth: `((epoch, places, blocks), …)`: `kr.grow(model, places, blocks=blocks)` before that epoch (from 0).
        growth_block: block of `growth`.
        growth_gate: gate of `growth`; None is the block's default.
        precision: dtype policy of the model.
        jit: compile steps with XLA (slower on most CPUs).
        steps_per_execution: steps per call of the device loop; lowered to a divisor of the steps of an epoch.
        devices: names of the devices of this process, e.g. `("GPU:0",)`; empty for all GPUs, or the CPU.
        workers: `host:port` of every process of a multi-worker run, the same on all; empty for one process.
        index: number of this process among `workers`.
        lost_worker: when another worker is gone: `"stop"`, or `"wait"` for it.
        sync_batch_norm: batch statistics over all replicas; None: where a replica has fewer than 16 images.
        seed: of weights, order and augmentation.
        deterministic: same bits in every run on one CPU device, at some cost in speed; stays on for the whole process.
        save_every: steps between two checkpoints; there is one after every epoch too.
        tensorboard: write TensorBoard logs (extra `tensorboard`).
    """

    model: str = "resnet20"
    model_options: dict = field(default_factory=dict)
    weights: str | None = None
    data: str = "cifar10"
    data_path: str | None = None
    corrupt: str = "fail"
    cache: bool = False
    holdout: int = 0
    validate: str = "auto"
    recipe: str | None = None
    image_size: int | None = None
    epochs: int = 10
    batch_size: int = 128
    accumulate: int = 1
    learning_rate: float = 0.1
    base_batch: int = 256
    optimizer: str = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    schedule: str = "cosine"
    milestones: tuple[float, ...] = ()
    factor: float = 0.1
    warmup_epochs: float = 0.0
    warmup_to_batch: bool = False
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    loss: str = "auto"
    label_smoothing: float = 0.0
    shuffle: bool = True
    crop_padding: int = 0
    random_area: float = 0.0
    flip: bool = False
    randaugment: int = 0
    magnitude: float = 9.0
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    small_crops: float = 1.0
    small_epochs: float = 0.0
    drop_path: float | None = None
    ema: float = 0.0
    gate_lr_multiplier: float = 1.0
    new_lr_multiplier: float = 1.0
    new_decay_multiplier: float = 1.0
    frozen_epochs: int = 0
    trunk_lr_multiplier: float = 1.0
    growth: tuple = ()
    growth_block: str = "preact"
    growth_gate: str | None = None
    precision: str = "float32"
    jit: bool = False
    steps_per_execution: int = 1
    devices: tuple[str, ...] = ()
    workers: tuple[str, ...] = ()
    index: int = 0
    lost_worker: str = "stop"
    sync_batch_norm: bool | None = None
    seed: int = 0
    deterministic: bool = False
    save_every: int = 500
    tensorboard: bool = False

    def __post_init__(self):
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            value = _simple(value)
            object.__setattr__(self, item.name, value)
            _check_kind(item, value)
            if item.name in CHOICES and value not in CHOICES[item.name]:
                raise TrainingError(f"`{item.name}` must be one of {', '.join(map(repr, CHOICES[item.name]))}, got {value!r}")
        for name in ("epochs", "batch_size", "base_batch", "steps_per_execution", "save_every", "accumulate"):
            _check(self, name, 1)
        for name in ("holdout", "frozen_epochs", "crop_padding", "randaugment", "index", "seed"):
            _check(self, name, 0)
        for name in (
            "learning_rate", "momentum", "factor", "warmup_epochs", "weight_decay", "clip_norm", "label_smoothing",
            "random_area", "erasing", "mixup", "cutmix", "ema", "gate_lr_multiplier", "trunk_lr_multiplier", "small_epochs", "new_lr_multiplier", "new_decay_multiplier",
        ):  # fmt: skip
            _check(self, name, 0)
        for name in ("momentum", "label_smoothing", "random_area", "erasing", "ema", "small_epochs"):
            if getattr(self, name) > 1:
                raise TrainingError(f"`{name}` must be between 0 and 1, got {getattr(self, name)}")
        if self.frozen_epochs > self.epochs:
            raise TrainingError(f"`frozen_epochs` must be at most `epochs` ({self.epochs}), got {self.frozen_epochs}")
        if self.warmup_epochs >= self.epochs:
            raise TrainingError(f"`warmup_epochs` must be below `epochs` ({self.epochs}), got {self.warmup_epochs}")
        if not 0 < self.small_crops <= 1:
            raise TrainingError(f"`small_crops` must be above 0 and at most 1, got {self.small_crops}")
        for event in self.growth:
            if not _grows(event, self.epochs):
                raise TrainingError(f"`growth` holds (epoch below {self.epochs}, places, blocks), got {event!r}")
        for name, least in (("image_size", 1), ("drop_path", 0)):
            if getattr(self, name) is not None:
                _check(self, name, least)
        if self.seed >= 2**32:
            raise TrainingError(f"`seed` must be below 2**32, got {self.seed}")
        if list(self.milestones) != sorted(self.milestones) or any(epoch < 0 for epoch in self.milestones):
            raise TrainingError(f"`milestones` must be epochs in their order, got {self.milestones!r}")
        if not 0 <= self.magnitude <= 10:
            raise TrainingError(f"`magnitude` must be between 0 and 10, got {self.magnitude}")
        check_addresses(self.workers, "`workers`")
        if self.index and not self.workers:
            raise TrainingError(f"`index` is a process's number among `workers`, which are missing; got {self.index}")
        if self.workers and self.devices:
            raise TrainingError("`devices` are those of one process; leave them out with `workers`")
        if self.workers and not self.index < len(self.workers):
            raise TrainingError(f"`index` must be below the number of workers ({len(self.workers)}), got {self.index}")

    @classmethod
    def of(cls, recipe=None, **changes):
        """A run from a recipe and changes to it.

        Raises:
            TrainingError: unknown recipe or field, or a value out of range; the message names it.
        """
        fields = {}
        if recipe is not None:
            if not isinstance(recipe, str) or recipe not in RECIPES:
                raise TrainingError(f"unknown recipe {recipe!r}; choose from {', '.join(RECIPES)}")
            fields = {key: value for key, value in RECIPES[recipe].items() if key != "source"} | {"recipe": recipe}
        names = [item.name for item in dataclasses.fields(cls)]
        for key in changes:
            if key not in names:
                near = difflib.get_close_matches(key, names, 1)
                raise TrainingError(f"unknown option {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        return cls(**_merged(fields, changes))

    def to_dict(self):
        """Plain JSON values."""
        return {k: _plain(v) for k, v in dataclasses.asdict(self).items()}

    def essence(self):
        """What a checkpoint must agree on with the run that goes on from it: all that decides the course but for rounding."""
        free = (
            "model",
            "data",
            "devices",
            "workers",
            "index",
            "lost_worker",
            "save_every",
            "tensorboard",
            "jit",
            "steps_per_execution",
            "cache",
            "data_path",
            "recipe",
        )
        return {key: value for key, value in self.to_dict().items() if key not in free}

    def save(self, path):
        """Write the run as YAML."""
        Path(path).write_text(_yaml().safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")

    @classmethod
    def load(cls, path, **changes):
        """Read a run from YAML; `recipe` is applied below what the file says.

        Raises:
            TrainingError: no such file, not YAML, or an unknown field.
        """
        yaml = _yaml()
        try:
            fields = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise TrainingError(f"{path} cannot be read: {first_line(error)}") from error
        if not isinstance(fields, dict) or not all(isinstance(key, str) for key in fields):
            raise TrainingError(f"{path} must hold `option: value` lines")
        return cls.of(**_merged(fields, changes))


def _merged(fields, changes):
    """`changes` on top of `fields`; epochs within a run are parts of its whole, so a shorter run is the same one, faster."""
    fields, changes = ({key: _simple(value) for key, value in given.items()} for given in (fields, changes))
    for given in (fields, changes):
        for item in dataclasses.fields(Run):
            if item.name in given:
                _check_kind(item, given[item.name])
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


def _simple(value):
    """A value as YAML can hold it, lists as tuples: no numbers of NumPy, no paths."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_simple, value))
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if isinstance(value, np.generic) else value


def _check_kind(item, value):
    """Refuse a value that is not of its field's type."""
    kinds = typing.get_args(item.type) or (item.type,)
    if typing.get_origin(item.type) is tuple:
        fits, what = _is(value, tuple) and all(_is(part, kinds[0]) for part in value), f"a list of {KINDS[kinds[0]][2:]}s"
    else:
        fits, what = any(_is(value, kind) for kind in kinds), KINDS[kinds[0]]
    if not fits:
        raise TrainingError(f"`{item.name}` must be {what}, got {value!r}")


def _is(value, kind):
    # A whole number is a number; what is true or false is none.
    return isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))


def _check(run, name, least):
    value, kind = getattr(run, name), Run.__dataclass_fields__[name].type
    if not least <= value < math.inf:
        what = KINDS[(typing.get_args(kind) or (kind,))[0]]
        raise TrainingError(f"`{name}` must be {what} of at least {least}, got {value!r}")


def _grows(event, epochs):
    """Whether an event of `growth` can be."""
    if not isinstance(event, tuple) or len(event) != 3:
        return False
    return _is(event[0], int) and _is(event[2], int) and 0 <= event[0] < epochs and event[2] >= 1


def check_addresses(addresses, name):
    """Refuse addresses of processes that are no `host:port`, or not all different; TensorFlow would wait for them forever."""
    for address in addresses:
        host, _, port = str(address).rpartition(":")
        if not host or not port.isdecimal() or len(port) > 5 or not 0 < int(port) < 2**16 or address.split() != [address]:
            raise TrainingError(f"{name} must be host:port, with a port from 1 to 65535, got {address!r}")
    if len(set(addresses)) < len(addresses):
        raise TrainingError(f"{name} must be different ones, got {', '.join(addresses)}")


def _plain(value):
    return [_plain(part) for part in value] if isinstance(value, (tuple, list)) else value


def _yaml():
    try:
        import yaml
    except ImportError as error:
        raise TrainingError("PyYAML is not installed: pip install 'keras-resnet-export[train]'") from error
    return yaml
