"""Image formats: which files TensorFlow decodes as Pillow does, and what is made of the others before TensorFlow sees them.

A model is trained here and asked by `resnet-export predict`, which reads images with Pillow: upright, without alpha, and the
first picture of an animation. TensorFlow ignores the orientation that cameras write into photographs, and reads fewer formats.
So every image that the two would read differently is decoded by Pillow and handed on as a BMP or PNG.
"""

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# The formats and endings that `resnet-export predict` reads; a test keeps the two lists equal.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif")
ORIENTATION = 0x0112  # EXIF tag
PHOTO_FORMATS = ("JPEG", "MPO")  # MPO is a JPEG with further pictures after the first, as phones write it.


@dataclass(frozen=True)
class ImageFacts:
    """What matters about an image file before it is decoded.

    Attributes:
        needs_pillow: Whether TensorFlow would read other pixels than Pillow, or none.
        is_transparent: Whether some pixel is not opaque. The colour that is stored under it is what a model sees.
        is_animated: Whether the file holds several frames, of which the first is used.
    """

    needs_pillow: bool = False
    is_transparent: bool = False
    is_animated: bool = False


def facts_of(data: bytes) -> ImageFacts:
    """Read the facts of an encoded image.

    Args:
        data: Content of the file.

    Returns:
        `ImageFacts`; the default ones for content that Pillow does not recognise.

    Raises:
        ValueError: The header promises more pixels than Pillow opens.
    """
    try:
        with _open(data) as image:
            photo = image.format in PHOTO_FORMATS
            animated = not photo and getattr(image, "n_frames", 1) > 1
            upright = image.getexif().get(ORIENTATION, 1) in (0, 1)
            native = (photo and image.mode in ("RGB", "L")) or (image.format == "PNG" and not animated)
            return ImageFacts(not (native and upright), _is_transparent(image), animated)
    except UnidentifiedImageError:
        return ImageFacts()


def _is_transparent(image: Image.Image) -> bool:
    if image.mode not in ("RGBA", "LA", "PA", "RGBa", "La") and "transparency" not in image.info:
        return False
    return image.convert("RGBA").getchannel("A").getextrema()[0] != 255


def to_plain(data: bytes, channels: int, compact: bool = False) -> bytes:
    """Decode an image with Pillow and encode its pixels in a format that TensorFlow reads without loss.

    Args:
        data: Content of an image file.
        channels: 3 for RGB, 1 for grayscale.
        compact: Whether to compress, for bytes that are kept. A photo of 12 megapixels then takes half a second more.

    Returns:
        A PNG, or for RGB without `compact` a BMP: upright, without alpha, the first frame of an animation.
    """
    with _open(data) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype("uint8"))
        pixels = image.convert("RGB" if channels == 3 else "L")
    encoded = io.BytesIO()
    if channels == 3 and not compact:
        pixels.save(encoded, "BMP")
    else:  # TensorFlow reads no BMP of one channel.
        pixels.save(encoded, "PNG", compress_level=1 if compact else 0)
    return encoded.getvalue()


def _open(data: bytes) -> Image.Image:
    with warnings.catch_warnings():
        # Pillow warns of large images before it refuses very large ones.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            Image.init()
            return Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN])
        except Image.DecompressionBombError as error:
            raise ValueError(str(error)) from error
