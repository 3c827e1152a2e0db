"""Image files as people have them: PNG, JPEG and WebP, sideways, grey, transparent, or broken.

`examine` is for the plan, which meets 100,000 of them: it reads the header and looks where the file ends, and decodes
no pixel. `decode` is for the worker. Its work is bounded: pixels, and how often a scan passes over them
(image_parts.py).
"""

from dataclasses import dataclass
from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dailies.actors.image_parts import ImageError, Parts, parts_of
from dailies.model.files import first_line

MAX_IMAGE_BYTES = 64 << 20
MAX_PIXELS = 100_000_000            # as floats 1.2 GB; a page of an atlas, not a decompression bomb
MAX_SCANNED = 2_000_000_000         # pixels of all scans of a JPEG together: some seconds
MIN_SIDE = 32                       # pixels
ALLOWED = (f"a PNG, JPEG or WebP image of at least {MIN_SIDE} pixels a side, at most {MAX_PIXELS:,} pixels and "
           f"{MAX_IMAGE_BYTES >> 20} MiB")

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
           5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}


@dataclass(frozen=True, kw_only=True)
class ImageSize:
    """In pixels, upright."""

    height: int
    width: int


def examine(data: bytes) -> ImageSize:
    """The image's size, from its header.  Raises ImageError for what is no whole image or outside the limits."""
    if data[:4] + data[8:12] == b"RIFFWEBP" and len(data) < 8 + int.from_bytes(data[4:8], "little"):
        raise ImageError("a WEBP file of which the end is missing")    # asked first: it cannot be opened
    image, parts = opened_image(data)
    if not parts.whole:
        raise ImageError(f"a {image.format} file of which the end is missing")
    width, height = image.size
    if parts.orientation >= 5:                          # lies on its side
        height, width = width, height
    return ImageSize(height=height, width=width)


def decode_image(data: bytes) -> Tensor:
    """Pixels [3, H, W] in [-1, 1], fp32, upright. Of an animation the first frame; what is transparent becomes white.

    Raises ImageError.
    """
    image, parts = opened_image(data)
    turn = UPRIGHT.get(parts.orientation)
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
        raise ImageError(damage(error)) from error
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    return pixels.div_(255).sub_(0.5).div_(0.5)         # in the release's order, to the last bit


def opened_image(data: bytes) -> tuple[Image.Image, Parts]:
    """The image, its header read, and what its file is made of.  Raises ImageError."""
    if len(data) > MAX_IMAGE_BYTES:
        raise ImageError(f"{len(data):,} bytes")
    if not data:
        raise ImageError("an empty file")
    parts = parts_of(data)
    Image.MAX_IMAGE_PIXELS = None                       # our own limit is asked below, before any pixel is decoded
    try:
        image = Image.open(BytesIO(parts.data), formats=IMAGE_FORMATS)
    except Image.UnidentifiedImageError:
        raise ImageError(f"not a PNG, JPEG or WebP, but {image_kind(data)} of {len(data):,} bytes") from None
    except Exception as error:                          # Pillow raises many kinds for a damaged header
        raise ImageError(damage(error)) from error
    width, height = image.size
    if min(width, height) < MIN_SIDE or width * height > MAX_PIXELS:
        raise ImageError(f"{width:,}x{height:,} pixels")
    if width * height * parts.scans > MAX_SCANNED:
        raise ImageError(f"a JPEG of {parts.scans} scans over {width:,}x{height:,} pixels")
    return image, parts


def damage(error: Exception) -> str:
    """A library's sentence, unless it may quote what is in the file."""
    said = first_line(error)
    quotes = set("'\"\\") & set(said)
    return f"damaged ({type(error).__name__ if quotes else said})"


def image_kind(data: bytes) -> str:
    """What a file that is no image of ours is, by its first bytes, without showing any."""
    known = {b"GIF8": "a GIF image", b"BM": "a BMP image", b"II*\0": "a TIFF image", b"MM\0*": "a TIFF image",
             b"%PDF": "a PDF", b"PK\3\4": "a ZIP archive", b"\x1f\x8b": "a gzip file",
             b"\x28\xb5\x2f\xfd": "a zstd file",
             b"PAR1": "a Parquet file", b"\x89PNG": "a damaged PNG", b"\xff\xd8": "a damaged JPEG",
             b"RIFF": "a RIFF file"}
    for magic, name in known.items():
        if data.startswith(magic):
            return name
    if data[4:8] == b"ftyp":
        return "a HEIC or AVIF image or a video"
    try:
        data[:1024].decode()
    except UnicodeDecodeError as error:
        return "binary data" if error.start < len(data[:1024]) - 4 else "text"
    return "binary data" if b"\0" in data[:1024] else "text"
