"""The options of a run: declared once, as frozen dataclasses; YAML, command-line flags, help and checks derive from them.

PyYAML and click are enough for this: the flags are flat names, as users type them, and groups only sort them.
"""

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, ClassVar


class TrainingError(Exception):
    """A training cannot start or continue. The message says why, and what to do."""

    exit_code = 2


def option(default: Any, help: str, *, least: float | None = None, most: float | None = None, above: float | None = None,
           choices: tuple[str, ...] = ()) -> Any:  # fmt: skip
    """Declare an option.

    Args:
        default: Default value.
        help: One imperative phrase for `--help`, or what the value means.
        least: Smallest value.
        most: Largest value.
        above: Value that it must exceed.
        choices: All values, for an option that is one of a few names.
    """
    metadata = {"help": help, "least": least, "most": most, "above": above, "choices": choices}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class Options:
    """Base of the groups, which are dataclasses: checks every option by its declaration."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            check(item, getattr(self, item.name))


@dataclass(frozen=True)
class Network(Options):
    """Model"""

    model: str = option("resnet20", "Name of a model of the zoo, or a .keras or .h5 file.")
    model_options: dict = option({}, "Further arguments of create_model.")
    weights: str | None = option(None, "Initial weights: a name such as 'cifar10', a file, or a remote source.")
    image_size: int | None = option(
        None, "Side of the images in pixels, for the zoo and for files that take any; by default the data set's.", least=1
    )
    drop_path: float | None = option(
        None, "Probability to drop the deepest branch (stochastic depth), from 0 for the first.", least=0
    )
    precision: str = option(
        "float32", "Dtype policy of the model. auto takes half precision if the hardware is faster with it, which is "
        "measured briefly on CPUs, and keeps the choice when the run resumes.",
        choices=("auto", "float32", "float64", "mixed_float16", "mixed_bfloat16"),
    )  # fmt: skip


@dataclass(frozen=True)
class Dataset(Options):
    """Data"""

    data: str = option("cifar10", "digits, cifar10, cifar100, tfds/NAME, an .npz file, or a folder of images or shards.")
    data_path: str | None = option(None, "File with CIFAR (.npz), or folder with TFDS data sets. Downloaded by default.")
    corrupt: str = option("fail", "What to do with images that cannot be decoded: name them and stop, or leave them out.",
                          choices=("fail", "skip"))  # fmt: skip
    cache: bool = option(False, "Keep decoded images in memory.")
    holdout: int = option(
        0, "Hold out this many training images for validation, to choose a recipe without the test set.", least=0
    )
    validate: str = option("auto", "Validate after every epoch on held-out images, the validation split or the test set (auto), "
                           "on the test set, or not at all.", choices=("auto", "test", "none"))  # fmt: skip
    tta: str = option("none", "Test-time augmentation: at the end, also measure the mean over mirrored, or mirrored and shifted, "
                      "views of every image (figures that end in _tta).", choices=("none", "flip", "flip-shift"))  # fmt: skip
    shuffle: bool = option(True, "Read the training examples in a new order in every epoch.")


@dataclass(frozen=True)
class Optimization(Options):
    """Optimisation"""

    epochs: int = option(10, "Passes over the training examples.", least=1)
    initial_epoch: int = option(
        0, "Epoch to start at, counted from 0, with the learning rate and the order of examples of that epoch.", least=0
    )
    batch_size: int = option(128, "Examples per step over all devices (global batch).", least=1)
    accumulate: int = option(1, "Average the gradients of this many steps for one update of the weights.", least=1)
    learning_rate: float = option(0.1, "Learning rate for a batch of --base-batch; scaled linearly to the global batch.", least=0)
    base_batch: int = option(256, "Batch size that the learning rate is meant for.", least=1)
    optimizer: str = option("sgd", "SGD with momentum, AdamW, LAMB, or Muon: SGD with orthogonal updates of the kernels that a "
                            "norm follows.", choices=("sgd", "adamw", "lamb", "muon"))  # fmt: skip
    momentum: float = option(0.9, "Momentum factor of SGD, from 0 to 1.", least=0, most=1)
    nesterov: bool = option(False, "Use Nesterov momentum with SGD.")
    muon_rate: float = option(0.24, "Peak learning rate of the orthogonal updates of Muon, whatever the batch.", least=0)
    muon_momentum: float = option(0.6, "Momentum factor of the orthogonal updates of Muon, from 0 to 1.", least=0, most=1)
    schedule: str = option("cosine", "Learning rate schedule after the warm-up. one-cycle rises over 30 % of the run instead.",
                           choices=("constant", "step", "cosine", "linear", "one-cycle"))  # fmt: skip
    milestones: tuple[float, ...] = option((), "Epochs at which the schedule 'step' multiplies the learning rate by --factor.")
    factor: float = option(0.1, "Factor of every milestone.", least=0)
    warmup_epochs: float = option(0.0, "Epochs of linear warm-up.", least=0)
    warmup_to_batch: bool = option(False, "Warm up from the unscaled learning rate instead of 0.")
    weight_decay: float = option(0.0, "Weight decay of kernels: added to the gradient (L2) with SGD, otherwise decoupled.",
                                 least=0)  # fmt: skip
    beta_lr_multiplier: float = option(1.0, "Factor on the learning rate of β, the biases of norms.", least=0)
    beta_decay_multiplier: float = option(0.0, "Factor on the weight decay of β.", least=0)
    clip_norm: float = option(0.0, "Largest global norm of the gradient, after the sum over replicas; 0 for none.", least=0)
    loss: str = option("auto", "Cross-entropy (softmax), binary cross-entropy per class (sigmoid), or what fits (auto).",
                       choices=("auto", "softmax", "sigmoid"))  # fmt: skip
    ema: float = option(0.0, "Momentum of an average of the weights, which is validated and saved.", least=0, most=1)


@dataclass(frozen=True)
class Augmentation(Options):
    """Augmentation"""

    label_smoothing: float = option(0.0, "Share of every label that is spread evenly over all classes.", least=0, most=1)
    crop_padding: int = option(0, "Pixels around training images before a random crop of the model's size (CIFAR: 4).", least=0)
    crop_border: str = option("mean", "Content of these pixels: the mean colour of the data set, or the reflected image.",
                              choices=("mean", "reflect"))  # fmt: skip
    random_area: float = option(0.0, "Smallest share of a photograph's area that a random crop takes (ImageNet: 0.08); "
                                "photographs of several sizes get 0.25 where it is 0.", least=0, most=1)  # fmt: skip
    flip: bool = option(False, "Mirror half of the training images.")
    alternate_flips: bool = option(False, "With --flip, mirror a random half of the images in the first epoch and then "
                                   "alternate, so that two epochs show both sides of every image.")  # fmt: skip
    randaugment: int = option(0, "RandAugment operations per image.", least=0)
    magnitude: float = option(9.0, "Magnitude of RandAugment, from 0 to 10.", least=0, most=10)
    erasing: float = option(0.0, "Probability to fill a random rectangle with noise.", least=0, most=1)
    mixup: float = option(0.0, "α of MixUp; 0 for none.", least=0)
    cutmix: float = option(0.0, "α of CutMix; 0 for none.", least=0)
    small_crops: float = option(1.0, "Side of training crops in the first epochs, as a share of the model's.", above=0, most=1)
    small_epochs: float = option(0.0, "Share of the epochs with small crops.", least=0, most=1)


@dataclass(frozen=True)
class Growing(Options):
    """Growth and fine-tuning"""

    growth: tuple = option((), "Growth events (epoch, after, blocks): grow the model before that epoch.")
    growth_block: str = option("preact", "Kind of the blocks that --grow adds.")
    growth_gate: str | None = option(None, "Gate of the blocks that --grow adds; by default that of their kind.")
    growth_scale: str | float | None = option(None, "Constant factor of the branches that --grow adds: a number, or 'match' to "
                                              "measure it on training examples.", above=0, choices=("match",))  # fmt: skip
    frozen_epochs: int = option(0, "Epochs in which only grown blocks and the head learn.", least=0)
    backbone_lr_multiplier: float = option(1.0, "Factor on the learning rate of the backbone after that.", least=0)
    gate_lr_multiplier: float = option(1.0, "Factor on the learning rate of gates.", least=0)
    new_lr_multiplier: float = option(1.0, "Factor on the learning rate of grown blocks, apart from their gates.", least=0)
    new_decay_multiplier: float = option(1.0, "Factor on the weight decay of grown blocks.", least=0)


@dataclass(frozen=True)
class Distribution(Options):
    """Devices and machines"""

    devices: tuple[str, ...] = option((), "Devices of this process, e.g. GPU:0; by default all GPUs, or the CPU.")
    workers: tuple[str, ...] = option((), "host:port of every process of a run on several machines, in the same order on all.")
    index: int = option(0, "Number of this process among --workers.", least=0)
    lost_worker: str = option(
        "stop", "What to do when another worker is lost: stop, or restart and wait for it.", choices=("stop", "wait")
    )
    sync_batch_norm: bool | None = option(None, "Compute batch statistics over all replicas; by default if a replica has fewer "
                                          "than 16 examples.")  # fmt: skip
    fused_norm: bool = option(False, "Compute batch norm in training steps with TensorFlow's fused operation: the same apart "
                              "from rounding, and faster on CPUs.")  # fmt: skip
    jit: bool = option(False, "Compile steps with XLA (slower on most CPUs).")
    steps_per_execution: int = option(
        1, "Steps per call of the device loop; lowered to a divisor of the steps of an epoch.", least=1
    )


@dataclass(frozen=True)
class Keeping(Options):
    """Reproducibility and checkpoints"""

    seed: int = option(0, "Seed of weights, order and augmentation.", least=0, most=2**32 - 1)
    deterministic: bool = option(False, "Give the same bits in every run on one CPU device, which is slower.")
    save_every: int = option(500, "Steps between two checkpoints; there is one after every epoch too.", least=1)
    tensorboard: bool = option(False, "Write TensorBoard logs (extra 'tensorboard').")


KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    dict: "pairs of name and value",
    tuple: "a list",
}


def check(item: dataclasses.Field, value: Any) -> None:
    """Refuse a value that an option cannot have.

    Raises:
        TrainingError: Names the option and the values that it can have.
    """
    check_kind(item, value)
    told = item.metadata
    least, most, above = told["least"], told["most"], told["above"]
    if isinstance(value, str) and told["choices"] and value not in told["choices"]:
        number = "" if above is None else f" or a number above {above}"
        raise TrainingError(f"`{item.name}` must be one of {', '.join(map(repr, told['choices']))}{number}, got {value!r}")
    if value is None or isinstance(value, str) or (least is None and above is None):
        return
    if (least is not None and not least <= value < math.inf) or (above is not None and not value > above):
        what = KINDS[next(kind for kind in kinds_of(item) if kind is not str)]
        raise TrainingError(
            f"`{item.name}` must be {what} {f'of at least {least}' if above is None else f'above {above}'}, got {value!r}"
        )
    if most is not None and value > most:
        if above is not None or least is None:
            raise TrainingError(f"`{item.name}` must be above {above} and at most {most}, got {value!r}")
        raise TrainingError(f"`{item.name}` must be between {least} and {most}, got {value!r}")


def check_kind(item: dataclasses.Field, value: Any) -> None:
    """Refuse a value that is not of its option's type."""
    kinds = kinds_of(item)
    if typing.get_origin(item.type) is tuple:
        fits = isinstance(value, tuple) and all(is_kind(part, kinds[0]) for part in value)
        what = f"a list of {KINDS[kinds[0]][2:]}s"
    else:
        fits = any(is_kind(value, kind) for kind in kinds)
        what = " or ".join(KINDS[kind] for kind in kinds if kind is not types.NoneType)
    if not fits:
        raise TrainingError(f"`{item.name}` must be {what}, got {value!r}")


def kinds_of(item: dataclasses.Field) -> tuple[type, ...]:
    """Return the types that an option's values can have; of a list, the types of its parts."""
    return typing.get_args(item.type) or (item.type,)


def is_kind(value: Any, kind: type) -> bool:
    """Return whether a value is of a type. A whole number is a number; true and false are not."""
    if kind is types.NoneType:
        return value is None
    return isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))
