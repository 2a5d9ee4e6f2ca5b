"""Test-time augmentation: a model that averages its answers to several views of an image."""

import keras
from keras import ops

from ..graphs import data_format_at, graph_of

# Pixels by which an image is shifted, up and left or down and right, and the weight of the unshifted views.
SHIFT, UNSHIFTED = 1, 0.5


def averaged_over_views(model: keras.Model, kind: str) -> keras.Model:
    """Wrap an image classifier so that it averages its outputs over views of every image.

    Args:
        model: Model of one image; it is shared, not copied.
        kind: `"flip"` (the image and its mirror image), or `"flip-shift"` (these, and with half of the weight both of them
            shifted by a pixel up and left, and down and right; borders are reflected).

    Returns:
        Model with the same inputs and outputs.

    Source: the six views of airbench94 (arXiv 2404.00498, section 3.5).
    """
    image = model.inputs[0]
    vertical, horizontal = (1, 2) if data_format_at(image, graph_of(model)) == "channels_last" else (2, 3)

    def answer(x: keras.KerasTensor) -> keras.KerasTensor:
        return (model(x) + model(ops.flip(x, horizontal))) / 2

    outputs = answer(image)
    if kind == "flip-shift":
        padding = [(SHIFT, SHIFT) if axis in (vertical, horizontal) else (0, 0) for axis in range(4)]
        padded = ops.pad(image, padding, mode="reflect")
        start, end = slice(None, -2 * SHIFT), slice(2 * SHIFT, None)
        shifted = [answer(padded[tuple(part if side != (0, 0) else slice(None) for side in padding)]) for part in (start, end)]
        outputs = UNSHIFTED * outputs + (1 - UNSHIFTED) / 2 * (shifted[0] + shifted[1])
    return keras.Model(image, outputs, name=model.name)
