"""Augmentation as a pure function of (seed, epoch, image): all of an image's chances come from one stateless draw.

Keras' random layers hold a generator that counts calls, so inside a parallel `map` two runs with one seed differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tensorflow as tf

from . import randaugment


@dataclass(frozen=True)
class Augmentation:
    """What happens to a training image on its way in; the defaults change nothing but the size.

    Args:
        crop_padding: Pixels around the image before a crop of the model's size: CIFAR's crop.
        crop_border: What these pixels are: `"mean"` (the data set's mean colour) or `"reflect"` (the image's own reflection).
        random_area: Smallest share of the image's area that a random crop takes before it is resized: ImageNet's crop,
            with aspect ratios from 3/4 to 4/3. 0 switches it off.
        flip: Mirror left and right in half of the cases.
        alternate_flips: Mirror a random half of the images in even epochs, the other half in odd ones.
        randaugment: Number of RandAugment operations per image.
        magnitude: Magnitude of those operations, 0 to 10.
        erasing: Probability that a rectangle (2–33 % of the area) is filled with noise.

    Source: He et al. 2015 (arXiv 1512.03385) section 4.2; Szegedy et al. (arXiv 1409.4842); RandAugment (arXiv 1909.13719);
    random erasing (arXiv 1708.04896); alternating flips (arXiv 2404.00498, section 3.6).
    """

    crop_padding: int = 0
    random_area: float = 0.0
    flip: bool = False
    randaugment: int = 0
    magnitude: float = 9.0
    erasing: float = 0.0
    crop_border: str = "mean"
    alternate_flips: bool = False

    @property
    def draws(self) -> int:
        """Uniform numbers an image needs."""
        return 10 + 3 * self.randaugment

    def __call__(
        self, image: tf.Tensor, encoded: bool, size: Sequence[int], channels: int, fill: tf.Tensor, seed: tf.Tensor,
        is_mirrored: tf.Tensor | None = None,
    ) -> tf.Tensor:  # fmt: skip
        """One training image.

        Args:
            image: Uint8 `(height, width, channels)`, or encoded bytes.
            encoded: Whether `image` is encoded.
            size: `(height, width)` that goes out.
            channels: Number of channels of the image.
            fill: Colour of pixels outside the image, 0–255.
            seed: Two whole numbers, a function of run, epoch and image.
            is_mirrored: Whether to mirror the image, where that is not left to chance; see `turn`.

        Returns:
            Float32 `(height, width, channels)`, 0–255.
        """
        chance = tf.random.stateless_uniform([self.draws], seed)
        if self.random_area:
            image = resized_crop(image, encoded, size, channels, self.random_area, chance[:4])
        else:
            image = decode(image, channels) if encoded else image
            image = fit(image, size, self.crop_padding, fill, chance[:2], self.crop_border)
        if self.flip:
            is_mirrored = chance[4] < 0.5 if is_mirrored is None else is_mirrored
            image = tf.cond(is_mirrored, lambda: tf.reverse(image, [1]), lambda: image)
        if self.randaugment:
            image = tf.cast(tf.clip_by_value(tf.round(tf.cast(image, tf.float32)), 0, 255), tf.uint8)
            image = randaugment.apply(image, self.magnitude, tf.reshape(chance[10:], [self.randaugment, 3]), fill)
        image = tf.cast(image, tf.float32)
        if self.erasing:
            image = erase(image, self.erasing, chance[5:10], seed)
        return tf.ensure_shape(image, [*size, channels])

    def turn(self, seed: int, epoch: tf.Tensor, index: tf.Tensor) -> tf.Tensor | None:
        """Return whether `alternate_flips` mirrors an image in an epoch: by chance at first, then in turn; None without it."""
        if not (self.flip and self.alternate_flips):
            return None
        first = tf.random.stateless_uniform([], tf.stack([tf.cast(seed, tf.int64), -1 - index])) < 0.5
        return tf.math.logical_xor(first, epoch % 2 == 1)


def decode(data: tf.Tensor, channels: int) -> tf.Tensor:
    """Decode an image file to pixels."""
    return tf.io.decode_image(data, channels=channels, expand_animations=False)


def fit(
    image: tf.Tensor, size: Sequence[int], padding: int, fill: tf.Tensor, chance: tf.Tensor, border: str = "mean"
) -> tf.Tensor:
    """Crop an image to the model's size at random (in the middle if `chance` is None); resize a smaller one."""
    shape = tf.shape(image)
    if padding:
        sides = [[padding, padding], [padding, padding], [0, 0]]
        if border == "reflect":
            image = tf.pad(image, sides, "REFLECT")
        else:
            fill = tf.cast(tf.round(fill), image.dtype)
            image = tf.pad(image - fill, sides) + fill
        shape = shape + [2 * padding, 2 * padding, 0]

    def crop() -> tf.Tensor:
        room = shape[:2] - size
        chances = tf.constant([0.5, 0.5]) if chance is None else chance
        corner = tf.cast(tf.floor(chances * tf.cast(room + 1, tf.float32)), tf.int32)
        corner = tf.minimum(corner, room)
        return tf.slice(image, tf.concat([corner, [0]], 0), [*size, image.shape[-1]])

    known = image.shape[:2].as_list()
    if None not in known:
        return crop() if known[0] >= size[0] and known[1] >= size[1] else resize(image, size)
    return tf.cond(tf.reduce_all(shape[:2] >= size), crop, lambda: resize(image, size))


def resize(image: tf.Tensor, size: Sequence[int]) -> tf.Tensor:
    """Bilinear with antialiasing, back in the image's dtype."""
    resized = tf.image.resize(image, size, antialias=True)
    return tf.saturate_cast(tf.round(resized), image.dtype) if image.dtype == tf.uint8 else resized


def resized_crop(
    image: tf.Tensor, encoded: bool, size: Sequence[int], channels: int, smallest: float, chance: tf.Tensor
) -> tf.Tensor:
    """Crop an image at random area and aspect ratio, and resize it. Only that part of a JPEG is decoded."""
    shape = _shape(image, channels) if encoded else tf.shape(image)
    height, width = tf.cast(shape[0], tf.float32), tf.cast(shape[1], tf.float32)
    area = height * width * (smallest + (1 - smallest) * chance[0])
    ratio = tf.exp(tf.math.log(3 / 4) + (tf.math.log(4 / 3) - tf.math.log(3 / 4)) * chance[1])
    rows = tf.clip_by_value(tf.round(tf.sqrt(area / ratio)), 1, height)
    columns = tf.clip_by_value(tf.round(tf.sqrt(area * ratio)), 1, width)
    top, left = tf.floor(chance[2] * (height - rows + 1)), tf.floor(chance[3] * (width - columns + 1))
    window = tf.cast(tf.stack([top, left, rows, columns]), tf.int32)
    return resize(_window(image, encoded, channels, window), size)


def center_crop(image: tf.Tensor, encoded: bool, size: Sequence[int], channels: int, ratio: float = 0.875) -> tf.Tensor:
    """Crop the centre of an image, `ratio` of its shorter side, and resize it, as is done with test images.

    Of an image that would have to be enlarged for that, the whole shorter side is taken.
    """
    shape = _shape(image, channels) if encoded else tf.shape(image)
    ratio = tf.where(ratio * tf.cast(tf.reduce_min(shape[:2] / size), tf.float32) < 1, 1.0, ratio)
    height, width = tf.cast(shape[0], tf.float32), tf.cast(shape[1], tf.float32)
    scale = ratio * tf.minimum(height / size[0], width / size[1])
    rows, columns = tf.minimum(tf.round(scale * size[0]), height), tf.minimum(tf.round(scale * size[1]), width)
    window = tf.cast(tf.stack([tf.floor((height - rows) / 2), tf.floor((width - columns) / 2), rows, columns]), tf.int32)
    return resize(_window(image, encoded, channels, window), size)


def _shape(data, channels):
    return tf.cond(
        tf.io.is_jpeg(data),
        lambda: tf.io.extract_jpeg_shape(data, output_type=tf.int32),
        lambda: tf.shape(decode(data, channels)),
    )


def _window(image, encoded, channels, window):
    if not encoded:
        return tf.slice(image, [window[0], window[1], 0], [window[2], window[3], channels])
    cropped = tf.cond(
        tf.io.is_jpeg(image),
        lambda: tf.io.decode_and_crop_jpeg(image, window, channels=channels),
        lambda: tf.slice(decode(image, channels), [window[0], window[1], 0], [window[2], window[3], channels]),
    )
    return tf.ensure_shape(cropped, [None, None, channels])


def erase(image: tf.Tensor, probability: float, chance: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Fill a random rectangle with noise."""
    height, width = image.shape[0], image.shape[1]
    area = (0.02 + 0.31 * chance[1]) * height * width
    ratio = tf.exp(tf.math.log(0.3) + (tf.math.log(3.3) - tf.math.log(0.3)) * chance[2])
    rows, columns = tf.minimum(tf.sqrt(area / ratio), height - 1.0), tf.minimum(tf.sqrt(area * ratio), width - 1.0)
    top, left = chance[3] * (height - rows), chance[4] * (width - columns)
    y, x = tf.range(height, dtype=tf.float32)[:, None, None], tf.range(width, dtype=tf.float32)[None, :, None]
    inside = (y >= top) & (y < top + rows) & (x >= left) & (x < left + columns) & (chance[0] < probability)
    noise = 255 * tf.random.stateless_uniform(tf.shape(image), seed + [1, 0])
    return tf.where(inside, noise, image)
