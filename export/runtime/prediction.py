"""Image files to labels, through an ONNX file that holds its own labels and preprocessing."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..artifact import Scores, find_scores, find_scores_or_values
from ..errors import UsageError
from . import images
from .sessions import Session, session

if TYPE_CHECKING:
    from .sessions import TensorInfo


@dataclass(frozen=True)
class Prediction:
    """What a file says about one image.

    Attributes:
        file: The image.
        classes: Class indices, best first.
        labels: Their names, or None each.
        probabilities: Their probabilities.
        values: `{output name: nested list}` of a file whose outputs do not score classes; the other fields are empty then.
    """

    file: str
    classes: tuple[int, ...]
    labels: tuple[str | None, ...]
    probabilities: tuple[float, ...]
    values: dict[str, list] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `values` only where there are some."""
        return {key: value for key, value in asdict(self).items() if key != "values" or value is not None}


def predict(
    path: str | os.PathLike[str] | Session,
    files: Sequence[str | os.PathLike[str]],
    *,
    top: int = 5,
    device: str = "auto",
    batch: int = 8,
    scores: str | None = None,
    output_kind: str | None = None,
) -> list[Prediction]:
    """Classify image files with an ONNX file; nothing else is needed, since labels and preprocessing are in it.

    Args:
        path: ONNX file with an image input, or an open `Session`.
        files: Image paths.
        top: Number of classes to return per image.
        device: See `sessions.session`.
        batch: Images per run; models with a fixed batch take theirs.
        scores: Name of the output that scores classes, for a file that does not state it.
        output_kind: What that output means, one of `options.KINDS`.

    Returns:
        One `Prediction` per file. A file whose outputs do not score classes gives the values of its outputs.

    Raises:
        UsageError: An image cannot be read, the model does not take images, or several outputs score classes.
        DeviceError: The device does not start.
    """
    model = path if isinstance(path, Session) else session(path, device)
    if top < 1:
        raise UsageError(f"`top` must be at least 1, got {top}")
    spec = image_input(model)
    ranking = scores_or_values(model, scores, output_kind)
    names, found = None if ranking is None else [ranking.output], []
    for start in range(0, len(files), batch):
        part = files[start : start + batch]
        parts = [model.run(group, names) for group in batches(part, model.card, spec)]
        if ranking is None:
            rows = ({name: array[row].tolist() for name, array in got.items()} for got in parts for row in range(_rows(got)))
            found += [Prediction(str(Path(file)), (), (), (), values) for file, values in zip(part, rows, strict=True)]
        else:
            probabilities = ranking.probabilities(np.concatenate([got[ranking.output] for got in parts]))
            found += [ranked(file, row, model.labels, top) for file, row in zip(part, probabilities, strict=True)]
    return found


def _rows(outputs: dict[str, np.ndarray]) -> int:
    return len(next(iter(outputs.values())))


def image_input(model: Session) -> TensorInfo:
    """Return the one image input (`TensorInfo`) of a session.

    Raises:
        UsageError: The model has several inputs, or one that is not an image.
    """
    if len(model.inputs) != 1 or model.inputs[0].layout is None:
        raise UsageError(f"{model.path.name} does not take one batch of images; its inputs are {_described(model.inputs)}")
    return model.inputs[0]


def scores_output(model: Session, scores: str | None = None, kind: str | None = None) -> Scores:
    """Return the output of a session that scores classes; see `artifact.find_scores`.

    Args:
        model: `sessions.Session`.
        scores: Name of the output, for a file that does not state it.
        kind: Kind of that output; by default the file's.

    Raises:
        UsageError: The file and the caller do not say which output scores classes.
    """
    return find_scores(model.metadata, _shapes(model), scores=scores, kind=kind, file=model.path.name)


def scores_or_values(model: Session, scores: str | None = None, kind: str | None = None) -> Scores | None:
    """As `scores_output`, but None for a model whose outputs are shown as they are; see `artifact.find_scores_or_values`."""
    return find_scores_or_values(model.metadata, _shapes(model), scores=scores, kind=kind, file=model.path.name)


def _shapes(model: Session) -> dict[str, list]:
    return {value.name: list(value.shape) for value in model.outputs}


def _described(values):
    return ", ".join(f"{value.name} [{', '.join(map(str, value.shape))}]" for value in values)


def batches(files: Sequence[str | os.PathLike[str]], card: dict[str, Any], spec: TensorInfo) -> Iterator[np.ndarray]:
    """Yield arrays that fit an input, as few as images of one size allow; a model of dynamic size takes each image as it is.

    Args:
        files: Image paths.
        card: The model card (dict).
        spec: The `TensorInfo` of the input.
    """
    fixed_batch = isinstance(spec.shape[0], int)
    groups = []
    for pixels in (load_pixels(file, card, spec) for file in files):
        if groups and groups[-1][-1].shape == pixels.shape and not fixed_batch:
            groups[-1].append(pixels)
        else:
            groups.append([pixels])
    for group in groups:
        yield stacked(group, spec)


def load_pixels(
    source: str | os.PathLike[str] | bytes, card: dict[str, Any], spec: TensorInfo, max_pixels: int = images.MAX_PIXELS
) -> np.ndarray:
    """Load an image file, or its bytes, as the uint8 pixels [height, width, channels] that an input takes.

    Raises:
        UsageError: Not an image, damaged, or larger than allowed.
    """
    height, width, channels = (*spec.shape[2:], spec.shape[1]) if spec.layout == "nchw" else spec.shape[1:]
    size = None if isinstance(height, str) or isinstance(width, str) else (height, width)
    pixels = images.decode(source, channels if isinstance(channels, int) else 3, max_pixels)
    return images.fit(pixels, card.get("preprocessing") or {}, size, max_pixels)


def stacked(pixels: Sequence[np.ndarray], spec: TensorInfo) -> np.ndarray:
    """Return pixels of one size as the array an input takes, in its dtype and layout."""
    array = np.stack(pixels).astype(spec.dtype)
    return array.transpose(0, 3, 1, 2) if spec.layout == "nchw" else array


def ranked(file: str | os.PathLike[str], scores: np.ndarray, labels: Sequence[str] | None, top: int) -> Prediction:
    """Return the `Prediction` for one row of probabilities; equal ones by index."""
    order = np.argsort(-scores, kind="stable")[:top]
    names = tuple(labels[index] if labels and index < len(labels) else None for index in order)
    return Prediction(
        str(Path(file)), tuple(int(index) for index in order), names, tuple(float(scores[index]) for index in order)
    )
