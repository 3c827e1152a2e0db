"""Image files for the tests: of every kind that is taken, and broken in every way that people send."""

import struct
import zlib
from io import BytesIO

import numpy as np
from PIL import Image


def pixels(height: int = 40, width: int = 60) -> np.ndarray:
    """Smooth, so that JPEG keeps it; red grows to the right, green downwards: every corner is another colour."""
    down, right = np.mgrid[:height, :width]
    return np.stack((255 * right / (width - 1), 255 * down / (height - 1), np.full((height, width), 40)),
                    -1).astype(np.uint8)


def encoded(image: Image.Image, kind: str = "png", **options) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(height: int = 40, width: int = 60) -> bytes:
    return encoded(Image.fromarray(pixels(height, width)))


def jpeg(height: int = 40, width: int = 60, orientation: int | None = None, **options) -> bytes:
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    return encoded(Image.fromarray(pixels(height, width)), "jpeg", quality=95, exif=exif, **options)


def palette(transparent: bool = False) -> bytes:
    image = Image.fromarray(pixels()).quantize(256)
    return encoded(image, **({"transparency": image.getpixel((0, 0))} if transparent else {}))


def deep_grey() -> bytes:
    """16 bits: what 8 bits of red would be, times 257, and a little that is rounded away."""
    return encoded(Image.fromarray(np.minimum(pixels()[:, :, 0] * 257.0 + 50, 65535).astype(np.uint16)))


def see_through() -> bytes:
    """The left half is not there."""
    alpha = np.full((40, 60, 1), 255, np.uint8)
    alpha[:, :30] = 0
    return encoded(Image.fromarray(np.concatenate((pixels(), alpha), axis=2), "RGBA"))


def only_header(height: int, width: int) -> bytes:
    """A PNG that promises so many pixels and has none; the header is whole."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"\0" * 100)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


# what is the matter, as the error says it, and the file
BROKEN = {
    "one-pixel.png": ("1x1 pixels", encoded(Image.new("RGB", (1, 1)))),
    "bomb.png": ("30,000x30,000 pixels", only_header(30_000, 30_000)),
    "flat.png": ("100x12 pixels", png(12, 100)),
    "cut.png": ("a PNG file of which the end is missing", png()[:-20]),
    "cut.jpg": ("a JPEG file of which the end is missing", jpeg()[:-40]),
    "cut.webp": ("a WEBP file of which the end is missing",
                 encoded(Image.fromarray(pixels()), "webp", lossless=True)[:-40]),
    "head.png": ("damaged (Truncated File Read)", png()[:20]),
    "head.jpg": ("damaged (Truncated File Read)", jpeg()[:30]),
    "text.png": ("not a PNG, JPEG or WebP, but text of 9 bytes", b"a red fox"),
    "page.svg": ("not a PNG, JPEG or WebP", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    "other.gif": ("not a PNG, JPEG or WebP, but a GIF image of ", encoded(Image.fromarray(pixels()), "gif")),
    "empty.png": ("an empty file", b""),
}
