"""The boxes of an MP4, walked before FFmpeg sees the file: it builds its index when it opens one, as large as a few
bytes announce.

What passes has the boxes that write_mp4 makes (clip_writer.py), each in its place, and tables that go with the samples
that there may be. Anything else is refused, whatever the standard allows beside it: fragments, edits, other files.

Source  ISO/IEC 14496-12 (2022): 4.2 sizes and types of boxes; 8.1.1 mdat; 8.2.1 moov; 8.3.1 trak; 8.4.3 hdlr; 8.5.2
        stsd; 8.6.1.2 stts; 8.6.1.3 ctts; 8.6.2 stss; 8.6.6 elst; 8.7.2 dref; 8.7.3.2 stsz; 8.7.4 stsc; 8.7.5 stco and
        co64; 8.9.2 sbgp; 12.1.3 and 12.2.3 what precedes the boxes in a picture's and a sound's entry of stsd.
        QuickTime File Format: meta, keys and ilst, in which an item's type is the number of its key.
"""

import os
import struct
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import BinaryIO

MOST_BOXES = 500                                        # ours has some 60
MOST_FRAMES = 100_000                                   # where nobody says how many are wanted: an hour
SOUNDS_PER_FRAME = 100                                  # of 1,024 samples each: 2 at 24 frames per second and 48 kHz
MOST_LEAF_BYTES = 1 << 20                               # of a box that is no table: texts, the encoders' settings

# what may stand in a box; another name is refused
INSIDE = {
    "": "ftyp,moov,free,mdat,uuid", "moov": "mvhd,trak,udta,free", "trak": "tkhd,edts,mdia,free", "edts": "elst",
    "mdia": "mdhd,hdlr,minf", "minf": "vmhd,smhd,hdlr,dinf,stbl", "dinf": "dref", "dref": "url ", "stsd": "avc1,mp4a",
    "stbl": "stsd,stts,stss,ctts,stsc,stsz,stco,co64,sdtp,sgpd,sbgp", "avc1": "avcC,pasp,colr,btrt,fiel",
    "mp4a": "esds,btrt", "udta": "meta", "meta": "hdlr,keys,ilst,free"}
# bytes before the first box inside
BEFORE = {"dref": 8, "stsd": 8, "avc1": 78, "mp4a": 28, "meta": 4}
SEVERAL = {"trak", "free"}
# bytes before a table, and of each of its lines
TABLES = {"stts": (8, 8), "ctts": (8, 8), "stss": (8, 4), "stsc": (8, 12), "stco": (8, 4), "co64": (8, 8)}


class BadBoxes(ValueError):
    """A file is no MP4 as it is written here; the message says where it differs."""


@dataclass(kw_only=True)
class Box:
    kind: str
    start: int                                          # of what is in it, behind its size and type
    end: int
    inside: list["Box"] = field(default_factory=list)

    def named(self, kind: str) -> "Box":
        """The one of this kind.  Raises BadBoxes where there is none."""
        if found := next((box for box in self.inside if box.kind == kind), None):
            return found
        raise BadBoxes(f"a box {self.kind or 'on top'} needs a box {kind} in it, and has none")


def check_boxes(file: BinaryIO, *, frames: int | None = None, ours: bytes = b"") -> None:
    """Raises BadBoxes (a ValueError).  file: at any place; left at its beginning.

    frames: that may be in it.  ours: the 16 bytes by which a box of type uuid must begin.
    """
    num_bytes = file.seek(0, os.SEEK_END)
    walk = Walk(file, ours)
    top = Box(kind="", start=0, end=num_bytes)
    walk.into(top)
    if b"qt  " in walk.read(top.named("ftyp")):          # there the entries of stsd have other sizes
        raise BadBoxes("a QuickTime file; an MP4 is needed")
    tracks = [box for box in top.named("moov").inside if box.kind == "trak"]
    kinds = [walk.read(track.named("mdia").named("hdlr"))[8:12] for track in tracks]
    if sorted(kinds) not in ([b"vide"], [b"soun", b"vide"]):
        raise BadBoxes(f"one track of pictures and at most one of sound are needed; it has {len(tracks)}")
    most = MOST_FRAMES if frames is None else 2 * frames + 16          # a few too many are counted as they are decoded
    for track, kind in zip(tracks, kinds, strict=True):
        check_track(walk, track, most if kind == b"vide" else SOUNDS_PER_FRAME * (most + 1), num_bytes)
    file.seek(0)


class Walk:
    """A file's boxes, counted as they are found."""

    def __init__(self, file: BinaryIO, ours: bytes):
        self.file, self.ours, self.left = file, ours, MOST_BOXES

    def read(self, box: Box, at: int = 0, num_bytes: int | None = None) -> bytes:
        """What is in a box, from `at`.  Raises BadBoxes where it is not there."""
        num_bytes = box.end - box.start - at if num_bytes is None else num_bytes
        if num_bytes < 0 or box.start + at + num_bytes > box.end:
            raise BadBoxes(f"its box {box.kind} is too short")
        self.file.seek(box.start + at)
        return self.file.read(num_bytes)

    def into(self, box: Box) -> None:
        """Find what is in a box, and in that, which ends: INSIDE leads into no box again.  Raises BadBoxes."""
        allowed, at = INSIDE[box.kind].split(","), box.start + BEFORE.get(box.kind, 0)
        if box.kind == "meta" and self.read(box, 0, 4) + self.read(box, 8, 4) != b"\0\0\0\0hdlr":
            raise BadBoxes("its box meta does not begin with a box hdlr")
        while at < box.end:
            found = self.header(box, at)
            at = found.end
            if found.kind not in allowed:
                raise BadBoxes(f"a box {found.kind!r} in {box.kind or 'the file'}, where none of ours has one")
            if found.kind not in SEVERAL and any(other.kind == found.kind for other in box.inside):
                raise BadBoxes(f"two boxes {found.kind} in one")
            if found.kind == "uuid" and self.read(found, 0, 16) != self.ours:
                raise BadBoxes("a box uuid that is not ours")
            box.inside.append(found)
            if found.kind in INSIDE:
                self.into(found)
            elif found.kind == "ilst":
                self.items(found)
            elif found.kind not in ("mdat", "free", "stsz", "sdtp", "sbgp", *TABLES) \
                    and found.end - found.start > MOST_LEAF_BYTES:
                raise BadBoxes(f"a box {found.kind} of {found.end - found.start:,} bytes")
        if at != box.end:
            raise BadBoxes(f"what is in its box {box.kind} does not end where it does")

    def header(self, box: Box, at: int) -> Box:
        """The box that begins at `at`, in another.  Raises BadBoxes."""
        self.left -= 1
        if self.left < 0:
            raise BadBoxes(f"more than {MOST_BOXES} boxes")
        size, kind = struct.unpack(">I4s", self.read(box, at - box.start, 8))
        head = 8
        if size == 1:
            size, head = int.from_bytes(self.read(box, at - box.start + 8, 8)), 16
        if size < head or at + size > box.end:           # 0 would be: to the end of the file
            raise BadBoxes(f"a box {kind.decode('latin-1')!r} of {size:,} bytes, where {box.end - at:,} are left")
        return Box(kind=kind.decode("latin-1"), start=at + head, end=at + size)

    def items(self, ilst: Box) -> None:
        """Of an ilst, in which any name but a key's number or a text's could be that of another box."""
        at = ilst.start
        while at < ilst.end:
            found = self.header(ilst, at)
            at = found.end
            if not found.kind.startswith(("\0\0\0", "\xa9")):
                raise BadBoxes(f"a box {found.kind!r} among its texts")

    def table(self, box: Box) -> tuple[bytes, int]:
        """The lines of a table, and how many it says they are.  Raises BadBoxes unless it has exactly those."""
        head, each = TABLES[box.kind]
        count = int.from_bytes(self.read(box, 4, 4))
        if box.end - box.start != head + count * each:
            raise BadBoxes(f"its box {box.kind} says {count:,} lines, and does not have those")
        return self.read(box, head), count


def check_track(walk: Walk, track: Box, most: int, num_bytes: int) -> None:
    """Raises BadBoxes for tables that make more of a track than `most` samples, or than `num_bytes` of them in all."""
    media = track.named("mdia").named("minf")
    reference = media.named("dinf").named("dref")
    if walk.read(reference, 4, 4) != b"\0\0\0\1" or walk.read(reference.named("url ")) != b"\0\0\0\1":
        raise BadBoxes("a track that lies in another file")
    if edits := next((box for box in track.inside if box.kind == "edts"), None):
        check_edit(walk, edits.named("elst"))
    boxes = media.named("stbl")
    check_entry(walk, boxes.named("stsd"))
    samples = sizes(walk, boxes.named("stsz"), most, num_bytes)
    there = {box.kind: box for box in boxes.inside}
    for kind in ("stts", "ctts"):
        if kind in there:
            lines, _ = walk.table(there[kind])
            if sum(count for count, _ in struct.iter_unpack(">II", lines)) > samples:
                raise BadBoxes(f"its box {kind} has times for more than the {samples:,} samples that there are")
    for kind in TABLES:
        if kind in there and walk.table(there[kind])[1] > samples:
            raise BadBoxes(f"its box {kind} has more lines than there are samples, {samples:,}")
    for kind in ("sdtp", "sbgp"):
        if kind in there and there[kind].end - there[kind].start > 8 * samples + 32:
            raise BadBoxes(f"its box {kind} has more lines than there are samples, {samples:,}")
    check_chunks(walk, there, samples)


def check_edit(walk: Walk, edits: Box) -> None:
    """One edit, at the rate of 1: none that repeats.  What it leaves out are samples, which are few by now."""
    begun = walk.read(edits, 0, 8)
    line = {0: ">IiI", 1: ">QqI"}.get(begun[0])
    if line is None or begun[4:] != b"\0\0\0\1" or edits.end - edits.start != 8 + struct.calcsize(line):
        raise BadBoxes("its list of edits does not have exactly one")
    _, begins, rate = struct.unpack(line, walk.read(edits, 8))
    if begins < 0 or rate != 0x10000:
        raise BadBoxes("an edit that does not play what there is as it is")


def check_entry(walk: Walk, described: Box) -> None:
    """Of one kind of samples, with the boxes behind as many bytes as BEFORE says."""
    if walk.read(described, 4, 4) != b"\0\0\0\1" or len(described.inside) != 1:
        raise BadBoxes("samples of other than one kind in a track")
    entry = described.inside[0]
    if entry.kind == "avc1" and walk.read(entry, 74, 2) != b"\0\x18":           # of 8 bits a palette would follow
        raise BadBoxes("pictures of other than 24 bits")
    if entry.kind == "mp4a" and walk.read(entry, 8, 2) != b"\0\0":
        raise BadBoxes("sound of another version's description")


def sizes(walk: Walk, box: Box, most: int, num_bytes: int) -> int:
    """How many samples a track has."""
    each, samples = struct.unpack(">II", walk.read(box, 4, 8))
    if samples > most:
        raise BadBoxes(f"{samples:,} samples in a track; at most {most:,} may be there")
    if box.end - box.start != 12 + (0 if each else 4 * samples):
        raise BadBoxes(f"its box stsz says {samples:,} sizes, and does not have those")
    listed = array("I", walk.read(box, 12))
    listed.byteswap()
    if each * samples + sum(listed) > num_bytes:
        raise BadBoxes(f"samples of more bytes than the file's {num_bytes:,}")
    return samples


def check_chunks(walk: Walk, there: Mapping[str, Box], samples: int) -> None:
    """The chunks hold the samples, each once."""
    if len(there.keys() & {"stco", "co64"}) != 1 or not there.keys() >= {"stsc", "stts"}:
        raise BadBoxes("a track without a table of its chunks")
    chunks = walk.table(there.get("stco") or there["co64"])[1]
    runs = list(struct.iter_unpack(">III", walk.table(there["stsc"])[0]))
    held = 0
    for (first, each, _), (following, *_) in pairs(runs, chunks):
        if not 1 <= first < following:
            raise BadBoxes("its box stsc does not count up")
        held += (following - first) * each
    if held != samples:
        raise BadBoxes(f"its chunks hold {held:,} samples, and there are {samples:,}")


def pairs(runs: list[tuple[int, ...]], chunks: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Each run of chunks with the one after it, the last with the end."""
    return zip(runs, [*runs[1:], (chunks + 1, 0, 0)], strict=True)
