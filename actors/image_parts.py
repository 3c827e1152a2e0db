"""What a PNG, JPEG or WebP file is made of, looked at before a library decodes it.

A decoder's work hangs on the parts of a file, not on its size: each scan of a JPEG passes over all pixels again, each
chunk costs a turn of a loop, each entry of an EXIF table may name the whole table, each compressed text unfolds. So the
parts are counted here, and only those that decide pixels are handed on; how the camera was held is read here, too.
"""

import re
import struct
import zlib
from dataclasses import dataclass

MAX_PARTS = 50_000                  # segments or chunks; libpng's own chunks are of 8 KiB, 64 MiB make 8,192
MAX_SCANS = 100                     # of a JPEG; the usual progressive ones have 10
MAX_SAID = 64 << 10                 # bytes of EXIF or XMP that are looked at
MAX_ENTRIES = 1_000                 # of an EXIF table
MAX_REST = 64                       # bytes of what is no part, which tell a library what is the matter

JPEG, PNG, WEBP = b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"RIFF"
MARKER = re.compile(rb"\xff+([^\xff\0])")
AFTER_SCAN = re.compile(rb"\xff[^\xff\0\xd0-\xd7]")     # neither a filled byte nor a restart
XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:=\"|>)([1-8])")
ORIENTATION = 0x0112                # of EXIF
TEXT_CHUNK = b"XML:com.adobe.xmp\0"


class ImageError(ValueError):
    """An image that cannot become a first frame; the message says what is the matter with it, and nothing of it."""


@dataclass(kw_only=True)
class Parts:
    """What was found; `data` is the file without what decides no pixel."""

    data: bytes
    whole: bool = False             # whether its end is there
    scans: int = 1
    exif: bytes = b""
    xmp: bytes = b""

    @property
    def orientation(self) -> int:
        """1 to 8, as EXIF counts them; 1 is upright, and what is said where nothing or nonsense is."""
        if said := exif_orientation(self.exif):
            return said
        found = XMP_ORIENTATION.search(self.xmp)
        return int(found[1]) if found else 1


def parts_of(data: bytes) -> Parts:
    """Raises ImageError for more parts than any camera or program makes. What is of no known kind is passed on."""
    if data.startswith(JPEG):
        return jpeg_parts(data)
    if data.startswith(PNG):
        return png_parts(data)
    if data.startswith(WEBP) and data[8:12] == b"WEBP":
        return webp_parts(data)
    return Parts(data=data)


def jpeg_parts(data: bytes) -> Parts:
    found, kept, at = Parts(data=data, scans=0), [data[:2]], 2
    for _ in range(MAX_PARTS):
        marker = MARKER.match(data, at)
        if marker is None:
            break
        at, kind = marker.end(), marker[1][0]
        if kind == 0xd9:                                # behind it phones append other things
            found.whole = True
            kept.append(b"\xff\xd9")
            break
        if kind == 0x01 or 0xd0 <= kind <= 0xd8:        # these have no length
            kept.append(data[at - 2:at])
            continue
        length = int.from_bytes(data[at:at + 2], "big")
        if length < 2 or at + length > len(data):
            at -= 2
            break
        begin, body = at - 2, data[at + 2:min(at + length, at + 34)]    # without the bytes that fill up before a marker
        at += length
        if kind == 0xda:
            found.scans += 1
            if found.scans > MAX_SCANS:
                raise ImageError(f"a JPEG of more than {MAX_SCANS} scans, where the usual ones have 1 to 15")
            after = AFTER_SCAN.search(data, at)
            at = len(data) if after is None else after.start()
        if kind == 0xe1 and body.startswith(b"Exif\0\0"):
            found.exif = found.exif or data[begin + 10:at]
        elif kind == 0xe1 and body.startswith(b"http://ns.adobe.com/xap/"):
            found.xmp = found.xmp or data[begin:at]
        elif kind in (0xe0, 0xee) or not (0xe0 <= kind <= 0xef or kind == 0xfe):    # JFIF and Adobe's name the colours
            kept.append(data[begin:at])
    else:
        raise ImageError(f"a JPEG of more than {MAX_PARTS:,} segments")
    found.data = b"".join(kept if found.whole else [*kept, data[at:at + MAX_REST]])
    return found


def png_parts(data: bytes) -> Parts:
    found, kept, at, pixels = Parts(data=data), [data[:8]], 8, False
    for _ in range(MAX_PARTS):
        length, kind = int.from_bytes(data[at:at + 4], "big"), data[at + 4:at + 8]
        end = at + 12 + length
        if len(kind) < 4 or end > len(data):
            break
        if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            # libraries draw what they can of a damaged one
            if zlib.crc32(memoryview(data)[at + 4:end - 4]) != int.from_bytes(data[end - 4:end], "big"):
                raise ImageError("a PNG with a damaged part: its checksum is another. Fetch it again")
            kept.append(data[at:end])
            pixels = pixels or kind == b"IDAT"
        elif kind == b"eXIf" and not pixels:            # a PNG may say it again behind its pixels
            found.exif = data[at + 8:min(end - 4, at + 8 + MAX_SAID)]
        elif kind == b"iTXt" and not pixels and data[at + 8:at + 8 + len(TEXT_CHUNK)] == TEXT_CHUNK:
            found.xmp = data[at + 8:min(end - 4, at + 8 + MAX_SAID)]
        at = end
        if kind == b"IEND":                             # behind it some programs leave something of theirs
            found.whole = True
            break
    else:
        raise ImageError(f"a PNG of more than {MAX_PARTS:,} chunks")
    found.data = b"".join(kept if found.whole else [*kept, data[at:at + MAX_REST]])
    return found


def webp_parts(data: bytes) -> Parts:
    """Of an animation the first frame stays."""
    size = int.from_bytes(data[4:8], "little")
    found, kept, at, frames = Parts(data=data, whole=len(data) >= 8 + size), [], 12, 0
    for _ in range(MAX_PARTS):
        kind, length = data[at:at + 4], int.from_bytes(data[at + 4:at + 8], "little")
        end = at + 8 + length + length % 2
        if at + 8 > min(len(data), 8 + size):
            break
        frames += kind == b"ANMF"
        if kind == b"EXIF":
            found.exif = data[at + 8:min(end, at + 8 + MAX_SAID)]
        elif kind == b"XMP ":
            found.xmp = data[at + 8:min(end, at + 8 + MAX_SAID)]
        elif kind == b"VP8X":                           # its flags name what is left out here
            kept += [data[at:at + 8], bytes(flag & ~0x2c for flag in data[at + 8:at + 9]), data[at + 9:end]]
        elif kind != b"ICCP" and (kind != b"ANMF" or frames == 1):
            kept.append(data[at:end])
        at = end
    else:
        raise ImageError(f"a WebP of more than {MAX_PARTS:,} chunks")
    if found.whole:
        body = b"".join([b"WEBP", *kept])
        found.data = b"RIFF" + struct.pack("<I", len(body)) + body
    return found


def exif_orientation(exif: bytes) -> int:
    """What the first table of an EXIF block says; 0 where nothing or nonsense is."""
    exif = exif[:MAX_SAID].removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None or len(exif) < 8:
        return 0
    begin = struct.unpack_from(order + "I", exif, 4)[0]
    if begin + 2 > len(exif):
        return 0
    count = struct.unpack_from(order + "H", exif, begin)[0]
    for at in range(begin + 2, min(begin + 2 + 12 * min(count, MAX_ENTRIES), len(exif) - 11), 12):
        tag, kind, values = struct.unpack_from(order + "HHI", exif, at)
        if tag == ORIENTATION and kind in (3, 4) and values == 1:       # a short, or a long number
            said = struct.unpack_from(order + ("H" if kind == 3 else "I"), exif, at + 8)[0]
            return said if 1 <= said <= 8 else 0
    return 0
