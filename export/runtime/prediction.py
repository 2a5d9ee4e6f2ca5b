"""Image files to labels, through an ONNX file that carries its own labels and preprocessing."""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..errors import UsageError
from . import images
from .sessions import session


@dataclass(frozen=True)
class Prediction:
    """The best classes of one image, best first: parallel tuples of class index, label (or None) and probability."""

    file: str
    classes: tuple
    labels: tuple
    probabilities: tuple

    def to_json(self):
        return asdict(self)


def predict(path, files, *, top=5, device="auto", batch=8):
    """Classify image files with an ONNX file; nothing else is needed, since labels and preprocessing are in it.

    Args:
        path: ONNX file with an image input and an output `logits` or `probabilities`, or an opened `runtime.Session`.
        files: image paths.
        top: how many classes to return per image.
        device: see `runtime.session`.
        batch: images per run; models with a fixed batch take theirs.

    Returns:
        list of `Prediction`, one per file.

    Raises:
        UsageError: an unreadable image, or a model that does not classify images.
        DeviceError: the device does not start.
    """
    model = path if hasattr(path, "run") else session(path, device)
    if top < 1:
        raise UsageError(f"`top` must be at least 1, got {top}")
    spec = image_input(model)
    name, is_logits = scores_output(model)
    found = []
    for start in range(0, len(files), batch):
        part = files[start : start + batch]
        scores = np.concatenate([model.run(group, [name])[name] for group in batches(part, model.card, spec)])
        found += [
            ranked(file, row, model.labels, top) for file, row in zip(part, softmax(scores) if is_logits else scores, strict=True)
        ]
    return found


def image_input(model):
    """The one image input (`TensorInfo`) of a session.

    Raises:
        UsageError: the model has several inputs, or one that is no image.
    """
    if len(model.inputs) != 1 or model.inputs[0].layout is None:
        raise UsageError(f"{model.path.name} does not take one batch of images; its inputs are {_described(model.inputs)}")
    return model.inputs[0]


def scores_output(model):
    """The output that ranks classes, and whether it holds logits.

    Raises:
        UsageError: the model has none.
    """
    names = [value.name for value in model.outputs]
    for name in ("logits", "probabilities"):
        if name in names and len(next(v for v in model.outputs if v.name == name).shape) == 2:
            return name, name == "logits"
    raise UsageError(
        f"{model.path.name} is no classifier: it has no output `logits` or `probabilities`, only {_described(model.outputs)}"
    )


def _described(values):
    return ", ".join(f"{value.name} [{', '.join(map(str, value.shape))}]" for value in values)


def batches(files, card, spec):
    """Arrays that fit an input, as few as images of one size allow; a model of open size takes each image as it is.

    Args:
        files: image paths.
        card: the model card (dict).
        spec: the `TensorInfo` of the input.
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


def load_pixels(source, card, spec, max_pixels=images.MAX_PIXELS):
    """One image file, or its bytes, as the uint8 pixels [height, width, channels] that an input takes.

    Raises:
        UsageError: not an image, damaged, or larger than allowed.
    """
    height, width, channels = (*spec.shape[2:], spec.shape[1]) if spec.layout == "nchw" else spec.shape[1:]
    size = None if isinstance(height, str) or isinstance(width, str) else (height, width)
    pixels = images.decode(source, channels if isinstance(channels, int) else 3, max_pixels)
    return images.fit(pixels, card.get("preprocessing") or {}, size, max_pixels)


def stacked(pixels, spec):
    """Pixels of one size as the array an input takes, in its dtype and layout."""
    array = np.stack(pixels).astype(spec.dtype)
    return array.transpose(0, 3, 1, 2) if spec.layout == "nchw" else array


def ranked(file, scores, labels, top):
    """The `Prediction` for one row of probabilities; equal ones by index."""
    order = np.argsort(-scores, kind="stable")[:top]
    names = tuple(labels[index] if labels and index < len(labels) else None for index in order)
    return Prediction(
        str(Path(file)), tuple(int(index) for index in order), names, tuple(float(scores[index]) for index in order)
    )


def softmax(logits):
    """Probabilities along the last axis, computed in float64."""
    shifted = np.exp(logits.astype("float64") - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)
