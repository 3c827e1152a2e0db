"""What is seen of a clip before it is played: a poster and a strip of frames, stored beside it."""

import hashlib
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_clip_writer import MemoryStore, moving_disc, request

from dailies.actors.clip_writer import ClipWriter
from dailies.actors.messages import Frames
from dailies.actors.poster import MOST_POSTER_BYTES, cell_size, poster, shown_frames
from dailies.pipeline.run.layout import clip_key, poster_id_in, poster_key


class Store(MemoryStore):
    """Posters come as bytes, clips as files."""

    def create(self, key, data, *, metadata=None):
        if isinstance(data, bytes):
            return self.objects.setdefault(key, data) is data
        return super().create(key, data, metadata=metadata)


def published(store, rgb, **about):
    asked = request(frames=len(rgb), height=rgb.shape[1], width=rgb.shape[2], **about)
    clip, = ClipWriter(store, clip_key, poster_key_of=poster_key)([Frames(request=asked, rgb=rgb)])
    return clip


def cell(sheet, column, row, columns=1, rows=1):
    """Part of the sheet, as an array; in cells."""
    width, height = sheet.width // 4, sheet.height // 3
    box = (column * width, row * height, (column + columns) * width, (row + rows) * height)
    return np.asarray(sheet.convert("RGB").crop(box)).astype(float)


def test_a_clip_is_published_with_its_poster_and_its_strip_in_order():
    store, shades = Store(), torch.arange(17) * 12 + 30
    rgb = shades.to(torch.uint8)[:, None, None, None].expand(17, 64, 96, 3).contiguous()
    clip = published(store, rgb)
    assert clip.notes == () and set(store.objects) == {clip_key("ab" * 32), poster_key("ab" * 32)}
    sheet = Image.open(io.BytesIO(store.objects[poster_key("ab" * 32)]))
    assert sheet.format == "WEBP" and sheet.size == (4 * 96, 3 * 64)
    first, *strip = shown_frames(17)
    assert (first, strip[0], strip[-1]) == (8, 0, 16)
    assert abs(cell(sheet, 0, 0, 2, 2).mean() - shades[first].item()) < 3
    for index, place in zip(strip, [(2, 0), (3, 0), (2, 1), (3, 1), (0, 2), (1, 2), (2, 2), (3, 2)], strict=True):
        assert abs(cell(sheet, *place).mean() - shades[index].item()) < 3


def test_equal_frames_make_equal_bytes_in_every_process():
    pictures = [moving_disc()[index].numpy() for index in shown_frames(9)]
    script = ("import sys, hashlib; sys.path.insert(0, sys.argv[1])\n"
              "from test_clip_writer import moving_disc\n"
              "from dailies.actors.poster import poster, shown_frames\n"
              "print(hashlib.sha256(poster([moving_disc()[i].numpy() for i in shown_frames(9)])).hexdigest())")
    done = subprocess.run([sys.executable, "-c", script, str(Path(__file__).parent)], capture_output=True, text=True,
                          check=True)
    assert done.stdout.strip() == hashlib.sha256(poster(pictures)).hexdigest()


@pytest.mark.parametrize("height, width", [(720, 1280), (1280, 720), (1024, 1024), (64, 64), (16, 400)], ids=str)
def test_a_poster_of_noise_has_at_most_40_kb(height, width):
    """The worst that can be compressed; of what a camera sees it takes the best quality."""
    noise = np.random.default_rng(7).integers(0, 256, (9, height, width, 3), np.uint8)
    made = poster(list(noise))
    across, down = cell_size(width, height)
    assert len(made) <= MOST_POSTER_BYTES
    assert Image.open(io.BytesIO(made)).size == (4 * across, 3 * down)
    assert abs(across / down / (width / height) - 1) < 0.05 and across * down <= 240 * 137


def test_a_clip_of_one_frame_has_a_poster():
    store = Store()
    published(store, moving_disc(frames=1))
    assert poster_key("ab" * 32) in store.objects


def test_a_poster_that_is_there_stays_and_one_of_another_file_is_replaced():
    store = Store()
    published(store, moving_disc())
    made = store.objects[poster_key("ab" * 32)]
    store.objects[poster_key("ab" * 32)] = b"an older version's"
    published(store, moving_disc())                     # the clip is there: so is its poster
    assert store.objects[poster_key("ab" * 32)] == b"an older version's"
    store.objects[clip_key("ab" * 32)] = b"somebody's"
    clip = published(store, moving_disc())
    assert "replaced" in clip.notes[0] and store.objects[poster_key("ab" * 32)] == made


def test_a_poster_that_cannot_be_made_or_stored_costs_no_clip(monkeypatch):
    class Full(Store):
        def create(self, key, data, *, metadata=None):
            if key.startswith("posters/"):
                raise OSError("No space left on device")
            return super().create(key, data, metadata=metadata)

    store = Full()
    clip = published(store, moving_disc())
    assert clip.notes == ("without a poster: No space left on device",) and [*store.objects] == [clip_key("ab" * 32)]
    monkeypatch.setattr("dailies.actors.clip_writer.poster", lambda pictures: 1 / 0)
    assert published(Store(), moving_disc()).notes == ("without a poster: division by zero",)


def test_only_our_own_names_are_posters():
    assert poster_id_in(poster_key("ab" * 32)) == "ab" * 32
    assert poster_id_in(f"posters/cd/{'ab' * 32}.webp") is None
    assert poster_id_in("posters/thumbs.db") is None
