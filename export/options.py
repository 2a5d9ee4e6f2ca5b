"""The options that decide what an ONNX file contains: declared once, for the API, the command line and the file's metadata."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from .errors import UsageError

# What the numbers of an output mean: scores before a softmax; probabilities that sum to 1; independent probabilities per class;
# the probability of class 1 of two; anything else.
KINDS = ("logits", "probabilities", "multilabel", "binary", "other")
LOWEST_OPSET, DEFAULT_OPSET, HIGHEST_OPSET = 13, 17, 23


def _option(default: Any, help: str, **click: Any) -> Any:
    return field(default=default, metadata={"help": help, **click})


@dataclass(frozen=True)
class ExportOptions:
    """What `to_onnx` puts into a file. Options that differ from their default are stored in the file, for `verify`.

    The metadata of each field describe its flag: `help`, `flag` where the name differs, `choices`, `least` (the smallest number),
    and what `click.option` takes.

    Attributes:
        opset: ONNX opset, 13 to 23.
        layout: `"nhwc"` or `"nchw"`, the layout of rank-4 inputs.
        input_dtype: `"float32"`, or `"uint8"` for a model that takes pixels.
        resize: Take uint8 images of any size, resized and cropped in the graph as the model's card says.
        outputs: Output names, see `conversion.signature.signature_of`; None is the model's own outputs.
        output_kind: Kind of the only output, or `{output name: kind}`; None reads it from the model's graph.
        dynamic_size: Dynamic height and width instead of the model's fixed ones.
        top_k: Number of classes in the additional outputs `top_classes` and `top_probabilities`; None adds none.
        prune_identity: True leaves out residual blocks that compute the identity, a number those whose gate is at most that.
    """

    opset: int = _option(DEFAULT_OPSET, f"ONNX opset, {LOWEST_OPSET} to {HIGHEST_OPSET}.", type=int)
    layout: str = _option("nhwc", "Layout of image inputs.", choices=("nhwc", "nchw"))
    input_dtype: str = _option(
        "float32", "Dtype of the input: uint8 for a model that takes pixels.", flag="--input", choices=("float32", "uint8")
    )
    resize: bool = _option(False, "With --input uint8: accept images of any size, and resize them in the graph as the card says.")
    outputs: tuple[str, ...] | None = _option(
        None,
        "Outputs of the file, comma-separated: names of the model's outputs, logits, probabilities, features, features_LAYER.",
        metavar="NAMES",
    )
    output_kind: str | dict[str, str] | None = _option(
        None,
        "Meaning of an output: logits, probabilities, multilabel, binary or other. With several outputs, NAME=KIND for each.",
        metavar="[NAME=]KIND",
        multiple=True,
    )
    dynamic_size: bool = _option(False, "Accept images of any height and width.")
    top_k: int | None = _option(
        None, "Add the outputs top_classes and top_probabilities with that many classes.", type=int, metavar="K"
    )
    prune_identity: float | bool | None = _option(
        None,
        "Leave out residual blocks whose gate is at most TOL; with 0, those that do nothing.",
        least=0.0,
        metavar="TOL",
    )

    def __post_init__(self) -> None:
        if isinstance(self.opset, bool) or not isinstance(self.opset, int) or not LOWEST_OPSET <= self.opset <= HIGHEST_OPSET:
            raise UsageError(f"`opset` must be a number from {LOWEST_OPSET} to {HIGHEST_OPSET}, got {self.opset!r}")
        if isinstance(self.outputs, str):
            object.__setattr__(self, "outputs", tuple(name.strip() for name in self.outputs.split(",") if name.strip()))
        if self.dynamic_size and self.resize:
            raise UsageError("`dynamic_size` and `resize` cannot be combined: `resize` resizes images to the model's fixed size")

    @property
    def prune_tolerance(self) -> float | None:
        """The largest gate of blocks that are left out, or None where none are."""
        if self.prune_identity is None or self.prune_identity is False:
            return None
        return 0.0 if self.prune_identity is True else float(self.prune_identity)

    def changed(self) -> dict[str, Any]:
        """Return the options that differ from their default, for the file's metadata."""
        pairs = ((f.name, getattr(self, f.name), f.default) for f in dataclasses.fields(self))
        return {name: list(value) if isinstance(value, tuple) else value for name, value, default in pairs if value != default}

    @classmethod
    def from_metadata(cls, options: dict[str, Any]) -> ExportOptions:
        """Return the options that a file's metadata state; unknown ones, of a later version, are refused.

        Raises:
            UsageError: An option is unknown or has no such value.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(options) - known):
            raise UsageError(f"the file was written with options that this version does not know: {', '.join(unknown)}")
        values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
        return cls(**values)
