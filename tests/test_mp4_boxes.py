"""A clip's boxes are walked before FFmpeg sees the file: forged ones are refused, ours pass."""

import io
import struct

import pytest
import torch
from test_clip_writer import moving_disc, request, write

from dailies.actors.clip_file import DIGEST_BYTES, DIGEST_HEAD, read_clip
from dailies.actors.mp4_boxes import BadBoxes, check_boxes


@pytest.fixture(scope="module")
def clip():
    """With sound, and without the digest behind it."""
    return write(request(), moving_disc(), torch.zeros(18_000, 2))[1][:-DIGEST_BYTES]


def check(data, frames=9):
    check_boxes(io.BytesIO(data), frames=frames, ours=DIGEST_HEAD[8:])


def box(kind, *inside):
    inside = b"".join(inside)
    return struct.pack(">I4s", 8 + len(inside), kind) + inside


def at(data, kind, number=0):
    """Where the box begins."""
    place = -1
    for _ in range(number + 1):
        place = data.index(kind, place + 1)
    return place - 4


def put(data, place, new):
    return data[:place] + new + data[place + len(new):]


def number(data, kind, offset, value, size=4):
    """The bytes at `offset` of what is in a box, as a number."""
    return put(data, at(data, kind) + 8 + offset, value.to_bytes(size))


def with_mdat_of_64_bits(data):
    place = at(data, b"mdat")
    inside = data[place + 8:]
    return data[:place] + struct.pack(">I4sQ", 1, b"mdat", 16 + len(inside)) + inside


FORGED = {
    "any number of samples of one size": lambda data: number(data, b"stsz", 4, 80_000_000, 8),
    "any number of samples": lambda data: number(data, b"stsz", 8, 80_000_000),
    "any number of samples of sound": lambda data: put(data, at(data, b"stsz", 1) + 16, (80_000_000).to_bytes(4)),
    "samples of sound of one size": lambda data: put(data, at(data, b"stsz", 1) + 12, (80_000_000).to_bytes(8)),
    "two edits of sound": lambda data: put(data, at(data, b"elst", 1) + 12, (2).to_bytes(4)),
    "all samples at one place": lambda data: number(number(data, b"stsz", 4, 10**6), b"stsz", 8, 9),
    "times for more samples": lambda data: number(data, b"stts", 8, 2**31),
    "shifts for more samples": lambda data: number(data, b"ctts", 8, 2**31),
    "more times than its box holds": lambda data: number(data, b"stts", 4, 2**20),
    "chunks of more samples": lambda data: number(data, b"stsc", 12, 2**31),
    "runs of chunks that jump": lambda data: number(data, b"stsc", 8, 2**31),
    "more chunks than its box holds": lambda data: number(data, b"stco", 4, 2**20),
    "places of 64 bits that are not there": lambda data: data.replace(b"stco", b"co64"),
    "more key frames": lambda data: number(data, b"stss", 4, 2**24),
    "two edits": lambda data: number(data, b"elst", 4, 2),
    "no end of edits": lambda data: number(data, b"elst", 4, 2**32 - 1),
    "an edit at another rate": lambda data: number(data, b"elst", 16, 0x20000),
    "an edit of nothing": lambda data: number(data, b"elst", 12, 2**32 - 1),
    "another file": lambda data: number(data, b"url ", 0, 0),
    "another kind of reference": lambda data: data.replace(b"url ", b"alis"),
    "two tracks of pictures": lambda data: data.replace(b"soun", b"vide"),
    "five tracks": lambda data: data.replace(b"moov", b"mooV") + box(b"moov", *[box(b"trak")] * 5),
    "a fragment": lambda data: data + box(b"moof", box(b"traf", box(b"trun", struct.pack(">II", 0, 2**31)))),
    "a fragment's index": lambda data: data + box(b"sidx", bytes(32)),
    "a track among the texts": lambda data: put(data, at(data, b"data") - 4, b"trak"),
    "a table in the entry of a picture": lambda data: data.replace(b"pasp", b"stsz").replace(b"btrt", b"stsz"),
    "a table in place of a text": lambda data: data.replace(b"keys", b"trun"),
    "compressed boxes": lambda data: data.replace(b"moov", b"cmov"),
    "two of one kind": lambda data: data + box(b"ftyp", b"isom"),
    "a QuickTime file": lambda data: data.replace(b"iso2", b"qt  "),
    "a palette": lambda data: data.replace(b"\0\x18\xff\xff", b"\0\x08\xff\xff"),
    "a size of nothing": lambda data: put(data, at(data, b"mdat"), bytes(4)),
    "a size of less than its head": lambda data: put(data, at(data, b"mdat"), b"\0\0\0\7"),
    "a size of 64 bits beyond the end": lambda data: data + struct.pack(">I4sQ", 1, b"free", 2**63),
    "a size of 64 bits that goes back": lambda data: data + struct.pack(">I4sQ", 1, b"free", 8),
    "any number of boxes": lambda data: data + box(b"free") * 10_000,
    "boxes in each other": lambda data: data + box(b"moov", *[struct.pack(">I4s", 80, b"trak")] * 10),
    "a uuid of others": lambda data: data + box(b"uuid", bytes(48)),
    "bytes behind the last box": lambda data: data + b"\0\0\0",
    "nothing": lambda data: b"", "a text": lambda data: b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\n",
}


@pytest.mark.parametrize("what", FORGED)
def test_a_file_with_other_boxes_than_a_clip_has_is_refused_unopened(what, clip, monkeypatch):
    forged = FORGED[what](clip)
    assert forged != clip
    monkeypatch.setattr("av.open", None)
    with pytest.raises(BadBoxes):
        check(forged)
    with pytest.raises(ValueError):
        read_clip(forged, wanted=(64, 64, 9))


def test_a_file_cut_off_anywhere_is_refused_and_with_a_byte_changed_ends_in_a_sentence_or_passes(clip):
    for end in range(0, len(clip), 7):
        with pytest.raises(BadBoxes):
            check(clip[:end])
    for place in range(0, at(clip, b"mdat"), 3):
        try:
            check(put(clip, place, bytes([clip[place] ^ 0xFF])))
        except BadBoxes as error:
            assert str(error).isprintable() or "\\x" in repr(str(error))


@pytest.mark.parametrize("frames", [1, 2, 9, 49])
@pytest.mark.parametrize("has_sound", [False, True])
def test_what_is_written_here_passes(frames, has_sound):
    sound = torch.rand(2000 * frames, 2) if has_sound else None
    data = write(request(frames=frames), moving_disc(frames), sound)[1]
    check(data, frames)
    check(data, None)
    check(with_mdat_of_64_bits(data[:-DIGEST_BYTES]), frames)
    assert read_clip(data, wanted=(64, 64, frames)).frames == frames
