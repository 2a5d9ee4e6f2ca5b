"""Image files to arrays, with Pillow: the one place that decodes, resizes and crops."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import UsageError

MAX_PIXELS = 64_000_000
MAX_BYTES = 64 * 2**20
INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# Pillow reads many more, some of them by starting other programs (EPS: Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif")


def decode(
    source: str | os.PathLike[str] | bytes, channels: int = 3, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES
) -> np.ndarray:
    """Decode an image to pixels, upright (EXIF orientation is applied) and without alpha.

    Differs from `keras.utils.load_img`: the size is checked before anything is decompressed, and 16-bit greyscale is scaled.

    Args:
        source: Path, or the encoded bytes.
        channels: 3 for RGB, 1 for greyscale.
        max_pixels: Largest allowed width × height.
        max_bytes: Largest allowed size of the encoded image.

    Returns:
        Uint8 array [height, width, channels].

    Raises:
        UsageError: Not an image, damaged, or larger than allowed.
    """
    if channels not in (1, 3):
        raise UsageError(f"the model needs {channels} channels, but an image has 1 or 3")
    name, data = _read(source, max_bytes)
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise UsageError(f"{name} is {width}×{height} pixels; at most {max_pixels:,} pixels are read")
            image = ImageOps.exif_transpose(_eight_bits(image, name))
            pixels = np.asarray(image.convert("RGB" if channels == 3 else "L"))
    except UsageError:
        raise
    except Image.DecompressionBombError as error:  # Pillow has a limit of its own for headers
        raise UsageError(f"{name} has too many pixels; at most {max_pixels:,} pixels are read") from error
    except UnidentifiedImageError as error:
        raise UsageError(f"{name} is not an image in a format that is read ({', '.join(_formats())})") from error
    except Exception as error:
        raise UsageError(f"{name} is a damaged image: {error}") from error
    return pixels.reshape(pixels.shape[0], pixels.shape[1], channels)


def _eight_bits(image, name):
    """The image with 8 bits per channel; Pillow itself would clip the values of deeper greyscale images.

    Raises:
        UsageError: The range of the values is not known: 32-bit integers and floats.
    """
    # 16-bit PNG and PGM files may come as 32-bit integers, within 16 bits.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(image) >> 8).astype("uint8"))
    if image.mode in ("I", "F"):
        kind = "32-bit integer" if image.mode == "I" else "floating-point"
        raise UsageError(f"{name} is a {kind} image, whose range of values is not known; convert it to 8 or 16 bits")
    return image


@functools.cache
def _formats():
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _read(source, max_bytes):
    if isinstance(source, bytes | bytearray | memoryview):
        name, size = "the image", len(source)
    else:
        name, path = str(source), Path(source)
        if path.is_dir():
            raise UsageError(f"{name} is a folder, not an image file")
        if not path.is_file():
            raise UsageError(f"{name} does not exist")
        size = path.stat().st_size
    if size > max_bytes:
        raise UsageError(f"{name} has {size:,} bytes; at most {max_bytes:,} are read")
    if name == "the image":
        return name, bytes(source)
    try:
        return name, path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {name}: {error.strerror}") from error


def fit(
    pixels: np.ndarray, preprocessing: dict[str, Any], size: Sequence[int] | None = None, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Bring pixels to the size a model wants, as its card says: shorter side to `resize` and centre crop, or stretched.

    Args:
        pixels: Uint8 array [height, width, channels].
        preprocessing: The card's entry, see `keras_resnet.modelcard.ModelCard`; `{}` for a model without card.
        size: [height, width] where the graph's input is fixed and the card names none.
        max_pixels: Largest allowed width × height before the crop: a long and narrow image grows with its shorter side.

    Returns:
        Uint8 array; as it came if neither the card nor `size` names a size.

    Raises:
        UsageError: Unknown interpolation, `resize` smaller than the crop, or an image too long and narrow.
    """
    target = preprocessing.get("size") or size
    if target is None:
        return pixels
    height, width = (int(side) for side in target)
    resampling = _interpolation(preprocessing.get("interpolation") or "bilinear")
    resize = preprocessing.get("resize")
    if resize is None:
        return _resize(pixels, height, width, resampling)
    if resize < max(height, width):
        raise UsageError(f"the card's `resize` ({resize}) must be at least its `size` ({height}×{width})")
    shorter = min(pixels.shape[:2])
    resized = [int(resize * side / shorter) for side in pixels.shape[:2]]
    if resized[0] * resized[1] > max_pixels:
        have, want = (f"{columns}×{rows}" for rows, columns in (pixels.shape[:2], resized))
        raise UsageError(
            f"the image of {have} pixels is too long and narrow: after resizing it has {want}, at most {max_pixels:,} pixels"
        )
    pixels = _resize(pixels, resized[0], resized[1], resampling)
    top, left = (round((have - want) / 2) for have, want in zip(pixels.shape[:2], (height, width), strict=True))
    return pixels[top : top + height, left : left + width]


def _interpolation(name):
    if name not in INTERPOLATIONS:
        raise UsageError(f"`interpolation` must be one of {', '.join(INTERPOLATIONS)}, got {name!r}")
    return INTERPOLATIONS[name]


def _resize(pixels, height, width, resampling):
    if pixels.shape[:2] == (height, width):
        return pixels
    if pixels.shape[2] != 3:  # Pillow would take two or four channels for transparency, and knows no more
        channels = [Image.fromarray(channel).resize((width, height), resampling) for channel in np.moveaxis(pixels, 2, 0)]
        return np.stack([np.asarray(channel) for channel in channels], axis=2)
    return np.asarray(Image.fromarray(pixels).resize((width, height), resampling))


def load(
    source: str | os.PathLike[str] | bytes, preprocessing: dict[str, Any], size: Sequence[int] | None = None, channels: int = 3
) -> np.ndarray:
    """Decode an image file (or its bytes) and fit it to an input: uint8 [height, width, channels]. See `decode` and `fit`."""
    return fit(decode(source, channels), preprocessing, size)


def find(folder: str | os.PathLike[str]) -> list[Path]:
    """Return all image files below a folder, sorted by path.

    Raises:
        UsageError: There is no such folder, or no image in it.
    """
    if not os.path.isdir(folder):
        raise UsageError(f"{folder} is not a folder")
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise UsageError(f"{folder} holds no images ({', '.join(SUFFIXES)})")
    return paths
