"""Image files as people have them: PNG, JPEG and WebP, sideways, grey, transparent, or broken.

`examine` is for the plan, which meets 100,000 of them: it reads the header and looks where the file ends, and decodes
no pixel. `decode` is for the worker.
"""

import re
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model.weights import first_line

MAX_BYTES = 64 << 20
MAX_PIXELS = 100_000_000            # as floats 1.2 GB; a page of an atlas, not a decompression bomb
MIN_SIDE = 32                       # pixels
ALLOWED = (f"a PNG, JPEG or WebP image of at least {MIN_SIDE} pixels a side, at most {MAX_PIXELS:,} pixels and "
           f"{MAX_BYTES >> 20} MiB")

FORMATS = ("PNG", "JPEG", "WEBP")
PNG_END = b"IEND\xaeB`\x82"
ORIENTATION = 0x0112                # of EXIF: how the camera was held
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
           5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}


class ImageError(ValueError):
    """An image that cannot become a first frame; the message says what is the matter with it."""


@dataclass(frozen=True, kw_only=True)
class ImageSize:
    """In pixels, upright."""

    height: int
    width: int


def examine(data: bytes) -> ImageSize:
    """The image's size, from its header.  Raises ImageError for what is no whole image or outside the limits."""
    if data[:4] + data[8:12] == b"RIFFWEBP" and len(data) < 8 + int.from_bytes(data[4:8], "little"):
        raise ImageError("a WEBP file of which the end is missing")    # asked first: it cannot be opened
    image = opened(data)
    # behind a PNG's end some programs leave something of theirs
    if image.format == "PNG" and data.rfind(PNG_END) < 0 or image.format in ("JPEG", "MPO") and not has_jpeg_end(data):
        raise ImageError(f"a {image.format} file of which the end is missing")
    width, height = image.size
    if orientation(image) >= 5:                         # lies on its side
        height, width = width, height
    return ImageSize(height=height, width=width)


def decode(data: bytes) -> Tensor:
    """Pixels [3, H, W] in [-1, 1], fp32, upright. Of an animation the first frame; what is transparent becomes white.

    Raises ImageError.
    """
    image = opened(data)
    turn = UPRIGHT.get(orientation(image))
    try:
        image.load()
        if image.mode.startswith("I"):                  # 16 bits of grey, which Pillow would cut off, not scale
            image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).round().clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        if turn is not None:
            image = image.transpose(turn)
    except Exception as error:                          # Pillow raises many kinds for a damaged file
        raise ImageError(f"damaged ({first_line(error)})") from error
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    return pixels.div_(255).sub_(0.5).div_(0.5)         # in the release's order, to the last bit


def opened(data: bytes) -> Image.Image:
    """The image, its header read.  Raises ImageError."""
    if len(data) > MAX_BYTES:
        raise ImageError(f"{len(data):,} bytes")
    if not data:
        raise ImageError("an empty file")
    Image.MAX_IMAGE_PIXELS = None                       # our own limit is asked below, before any pixel is decoded
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise ImageError(f"not a PNG, JPEG or WebP: it begins {data[:12]!r}") from None
    except Exception as error:                          # Pillow raises many kinds for a damaged header
        raise ImageError(f"damaged ({first_line(error)})") from error
    width, height = image.size
    if min(width, height) < MIN_SIDE or width * height > MAX_PIXELS:
        raise ImageError(f"{width:,}x{height:,} pixels")
    return image


def orientation(image: Image.Image) -> int:
    """1 to 8, as EXIF counts them; 1 is upright, and what is said where nothing or nonsense is.

    Asked of the header alone, by both who call it: a PNG may say it again behind its pixels.
    """
    try:
        said = Image.Image.getexif(image).get(ORIENTATION)
    except Exception:                                   # damaged EXIF damages no pixel
        return 1
    return said if said in UPRIGHT else 1


def has_jpeg_end(data: bytes) -> bool:
    """Whether the end mark follows the pixels; behind it phones append other things, and previews have their own."""
    at = 2
    while (marker := re.compile(rb"\xff+([^\xff\0])").match(data, at)) and at + 4 <= len(data):
        at = marker.end()
        if marker[1] == b"\xda":                        # the pixels begin; among them FF D9 is nothing but the end
            return data.find(b"\xff\xd9", at) >= 0
        at += int.from_bytes(data[at:at + 2], "big")
    return False
