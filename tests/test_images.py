"""Images that rows begin with: what is taken and how it is read, and what is the matter with the others."""

import os
import re
import struct
import time
import zlib
from io import BytesIO

import numpy as np
import pytest
import torch
from image_files import BROKEN, deep_grey, encoded, jpeg, only_header, palette, pixels, png, see_through
from PIL import Image

from dailies.actors import image_file
from dailies.actors.image_file import ImageSize, decode_image, examine
from dailies.actors.image_parts import ImageError
from dailies.pipeline.manifest.images import FoundImage, find_image, find_images, folder_of, locate_image, read_image
from dailies.pipeline.manifest.manifest import Manifest


def off(got: torch.Tensor, want: np.ndarray) -> float:
    """The largest difference of a decoded image from pixels [H, W, 3], in steps of 8 bits."""
    assert got.dtype == torch.float32 and got.shape == (3, *want.shape[:2])
    return ((got.permute(1, 2, 0) + 1) * 127.5 - torch.from_numpy(want.astype(np.float32))).abs().max().item()


GREY = pixels()[:, :, :1].repeat(3, axis=2)


@pytest.mark.parametrize("data, want, most", [
    (png(), pixels(), 1e-4),
    (encoded(Image.fromarray(pixels()), "webp", lossless=True), pixels(), 1e-4),
    (jpeg(), pixels(), 8),
    (jpeg(progressive=True), pixels(), 8),
    (encoded(Image.fromarray(pixels()).convert("CMYK"), "jpeg", quality=95), pixels(), 12),
    (encoded(Image.fromarray(pixels()[:, :, 0])), GREY, 1e-4),
    (encoded(Image.fromarray(pixels()[:, :, 0]), "jpeg", quality=95), GREY, 3),
    (deep_grey(), GREY, 1e-4),
    (palette(), pixels(), 24),
    (encoded(Image.fromarray(pixels()[:, :, 0] > 127)), (GREY > 127) * 255, 1e-4),
], ids=["png", "webp", "jpeg", "progressive", "cmyk", "grey", "grey-jpeg", "16-bit", "palette", "1-bit"])
def test_every_kind_becomes_the_pixels_that_it_shows(data, want, most):
    assert examine(data) == ImageSize(height=40, width=60)
    assert off(decode_image(data), want) <= most


def test_pixels_are_the_releases_to_the_last_bit():
    want = torch.from_numpy(pixels().copy()).permute(2, 0, 1).to(torch.float32).div(255).sub(0.5).div(0.5)
    assert torch.equal(decode_image(png()), want)


@pytest.mark.parametrize("orientation, upright", [
    (1, lambda p: p), (2, lambda p: p[:, ::-1]), (3, lambda p: p[::-1, ::-1]), (4, lambda p: p[::-1]),
    (5, lambda p: p.transpose(1, 0, 2)), (6, lambda p: np.rot90(p, -1)),
    (7, lambda p: np.rot90(p, 2).transpose(1, 0, 2)), (8, lambda p: np.rot90(p))])
def test_an_image_is_held_as_its_camera_was(orientation, upright):
    data, want = jpeg(orientation=orientation), np.ascontiguousarray(upright(pixels()))
    assert examine(data) == ImageSize(height=want.shape[0], width=want.shape[1])
    assert off(decode_image(data), want) <= 8


def test_an_orientation_is_read_from_png_and_webp_too_and_nonsense_is_none():
    for kind in ("png", "webp"):
        for orientation, size in ((6, ImageSize(height=60, width=40)), (77, ImageSize(height=40, width=60))):
            exif = Image.Exif()
            exif[0x0112] = orientation
            data = encoded(Image.fromarray(pixels()), kind, exif=exif)
            assert examine(data) == size and decode_image(data).shape == (3, size.height, size.width)
    broken = encoded(Image.fromarray(pixels()), exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert examine(broken) == ImageSize(height=40, width=60) and decode_image(broken).shape == (3, 40, 60)


def test_what_is_transparent_is_white():
    want = pixels().copy()
    want[:, :30] = 255
    assert off(decode_image(see_through()), want) <= 1e-4
    got = decode_image(palette(transparent=True))
    assert torch.equal(got[:, 0, 0], torch.ones(3)) and (got[:, 39, 59] < 1).any()


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.fromarray(pixels()), Image.new("RGB", (60, 40), "white")]
    for kind in ("webp", "png"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:],
                       **({"lossless": True} if kind == "webp" else {}))
        assert off(decode_image(data), pixels()) <= 1e-4


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_image_is_known_without_decoding_it(name, monkeypatch):
    said, data = BROKEN[name]
    monkeypatch.setattr(Image.Image, "load", None)
    with pytest.raises(ImageError) as caught:
        examine(data)
    assert str(caught.value).startswith(said)


def test_a_whole_image_is_examined_without_decoding_it(monkeypatch):
    webp = encoded(Image.fromarray(pixels()), "webp")
    files = [png(), jpeg(orientation=6), jpeg(progressive=True), webp, palette(), deep_grey()]
    monkeypatch.setattr(Image.Image, "load", None)
    for data in files:
        examine(data)
    assert examine(only_header(10_000, 10_000)) == ImageSize(height=10_000, width=10_000)
    with pytest.raises(ImageError, match="10,001x10,000 pixels"):
        examine(only_header(10_000, 10_001))


def test_what_phones_append_to_a_jpeg_is_no_damage_and_a_preview_is_no_end():
    assert examine(jpeg() + b"a film of three seconds" * 100) == ImageSize(height=40, width=60)
    exif = Image.Exif()
    exif[0x010E] = "preview: \xff\xd9"
    whole = encoded(Image.fromarray(pixels()), "jpeg", exif=exif.tobytes() + b"\xff\xd9")
    examine(whole)
    with pytest.raises(ImageError, match="the end is missing"):
        examine(whole[:-2])


@pytest.mark.parametrize("data", [png(), jpeg(), encoded(Image.fromarray(pixels()), "webp")],
                         ids=["png", "jpeg", "webp"])
def test_damage_in_the_middle_is_an_image_error_or_an_image(data):
    rng = np.random.default_rng(3)
    for _ in range(60):
        damaged = bytearray(data)
        for at in rng.integers(0, len(data), 4):
            damaged[at] = rng.integers(256)
        try:
            size = examine(bytes(damaged))
            assert decode_image(bytes(damaged)).shape == (3, size.height, size.width)
        except ImageError:
            pass


def test_a_file_above_the_limit_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    with open(path, "wb") as file:
        file.truncate(image_file.MAX_IMAGE_BYTES + 1)   # a hole: takes no room
    with pytest.raises(ImageError, match="67,108,865 bytes"):
        read_image(str(path))
    with pytest.raises(ImageError, match="67,108,865 bytes"):
        examine(bytes(image_file.MAX_IMAGE_BYTES + 1))


def test_paths_stay_under_the_manifests_folder(tmp_path):
    folder = tmp_path / "night"
    (folder / "deep").mkdir(parents=True)
    for path in (tmp_path / "outside.png", folder / "a.png", folder / "deep/b.png"):
        path.write_bytes(png())
    (folder / "link-out.png").symlink_to(tmp_path / "outside.png")
    (folder / "out").symlink_to(tmp_path)
    (folder / "link-in.png").symlink_to("deep/b.png")
    (folder / "round").symlink_to("round")
    for name in ("a.png", "./a.png", "deep/../a.png", "deep/b.png", str(folder / "a.png"), "link-in.png"):
        assert isinstance(find_image(str(folder), name), FoundImage), name
    for name, said in (("../outside.png", "outside the manifest's folder"),
                       ("link-out.png", "outside the manifest's folder"),
                       ("out/outside.png", "outside the manifest's folder"),
                       ("/etc/passwd", "outside the manifest's folder"),
                       (str(tmp_path / "outside.png"), "outside the manifest's folder"), ("c.png", "no such file"),
                       ("a.png/b", "no such file"), ("round", "no such file"), ("deep", "not a file"),
                       ("", "not a file"), (f"file://{folder}/a.png", "neither a path nor s3://"),
                       (f"FILE:{folder}/a.png", "neither a path nor s3://"),
                       ("https://example.org/a.png", "neither a path nor s3://"), ("x" * 1000, "File name too long")):
        found = find_image(str(folder), name)
        assert isinstance(found, ImageError) and said in str(found), (name, found)


def test_a_folder_that_is_called_as_the_shell_calls_homes_is_no_home(tmp_path, monkeypatch):
    (home := tmp_path / "home").mkdir()
    (home / "private.png").write_bytes(png())
    (tmp_path / "night/~").mkdir(parents=True)
    (tmp_path / "night/~/m.jsonl").write_text('{"prompt": "a", "image": "private.png"}')
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path / "night")
    [(file, _)] = Manifest.read(".").files
    assert str(find_image(folder_of(file), "private.png")) == "no such file"
    (tmp_path / "night/~/private.png").write_bytes(png())
    found = find_image(folder_of(file), "private.png")
    assert found.uri == str(tmp_path / "night/~/private.png") and read_image(found.uri, folder_of(file)) == png()


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    assert str(find_image(str(tmp_path), "pipe.png")) == "not a file: a pipe"


def test_a_relative_path_in_a_manifest_of_a_bucket_stays_under_its_prefix():
    assert locate_image("s3://b/nights/1", "images/a.png") == "s3://b/nights/1/images/a.png"
    assert locate_image("s3://b", "a.png") == "s3://b/a.png"
    for name in ("../a.png", "images/../../a.png", "/a.png", "./a.png", "images//a.png"):
        with pytest.raises(ImageError, match="outside the manifest's folder"):
            locate_image("s3://b/nights/1", name)


def test_images_in_a_bucket_are_read_and_each_trouble_is_its_rows(s3_bucket):
    from dailies.pipeline.store import open_store
    store = open_store(s3_bucket)
    store.put("night/a.png", png())
    store.put("huge.png", bytes(image_file.MAX_IMAGE_BYTES + 1))
    allowed = ["s3://no-such-bucket-here", "s3://user:secret@b"]
    names = ["a.png", f"{s3_bucket}/night/a.png", f"{s3_bucket}/night/b.png", f"{s3_bucket}/huge.png",
             "s3://no-such-bucket-here/a.png", "s3://user:secret@b/a.png", "s3://", s3_bucket]
    found = find_images([(f"{s3_bucket}/night", name) for name in names], allowed)
    assert found[0] == found[1] and found[0].uri == f"{s3_bucket}/night/a.png"
    assert found[0].size == ImageSize(height=40, width=60)
    for error, said in zip(found[2:], ["no such object", "67,108,865 bytes", "has no bucket no-such-bucket-here",
                                       *["not s3://BUCKET/KEY"] * 3], strict=True):
        assert isinstance(error, ImageError) and said in str(error)


def test_a_store_that_does_not_answer_is_no_rows_fault(s3_bucket, monkeypatch):
    from dailies.pipeline.manifest import images
    from dailies.pipeline.store import StoreError
    monkeypatch.setattr(images, "stores", {})
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match="does not answer"):
        find_images([(s3_bucket, "a.png")])


def test_a_thousand_images_are_read_by_a_few_at_a_time(tmp_path, monkeypatch):
    from dailies.pipeline.manifest import images
    (tmp_path / "a.png").write_bytes(png())
    running, most = [], []

    def slow(uri, folder):
        running.append(uri)
        most.append(len(running))
        time.sleep(0.001)
        running.pop()
        return png()

    monkeypatch.setattr(images, "read_image", slow)
    assert len(find_images([(str(tmp_path), "a.png")] * 1000)) == 1000
    assert 1 < max(most) <= images.READERS


def test_nothing_of_an_image_is_run_or_opened(tmp_path):
    """Formats that can name other files or programs are not among those that Pillow is asked to try."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n"
    with pytest.raises(ImageError, match="not a PNG, JPEG or WebP"):
        examine(eps)


@pytest.mark.parametrize("content", [b"PASSWORD=hunter2", b"hunter2-pw\n", b"\x1f\x8bhunter2", b"hunter2" * 5000,
                                     b"\x89PNG\r\n\x1a\n" + b"\0\0\0\7hunt" + b"hunter2" * 9, b"\xff\xd8hunter2",
                                     b"\0hunter2",
                                     b"RIFF\x20\0\0\0WEBPhunter2hunter2hunter2hunter2", b"\0\0\0\x18ftyphunter2"])
def test_what_is_said_of_a_file_that_is_no_image_shows_nothing_of_it(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    for said in (str(find_image(str(tmp_path), "a.png")),
                 *(str(error) for error in raised(examine, decode_image, content))):
        assert said.startswith(("not a PNG, JPEG or WebP, but ", "damaged (", "a WEBP file of which")), said
        assert not any(part in said for part in ("PASS", "hun", "ter2"))


def raised(*calls):
    *functions, argument = calls
    for function in functions:
        with pytest.raises(ImageError) as caught:
            function(argument)
        yield caught.value


@pytest.mark.parametrize("folder, name",
                         [("s3://night/m", "s3://night/m/" + "x" * 1025), ("s3://night/" + "m" * 1000, "x" * 30),
                                          ("s3://night/m", "ü" * 520)])
def test_a_key_that_no_store_takes_is_its_rows_trouble(folder, name):
    with pytest.raises(ImageError, match="a key of 1,0[0-9]{2} bytes; S3 allows 1,024"):
        locate_image(folder, name)


def test_hidden_files_are_no_images_and_neither_is_what_a_link_hides(tmp_path):
    (tmp_path / ".aws").mkdir()
    for name in (".env", ".aws/a.png", "a.png"):
        (tmp_path / name).write_bytes(png())
    (tmp_path / "b.png").symlink_to(".aws/a.png")
    (tmp_path / "open").symlink_to(".aws")
    (tmp_path / ".link.png").symlink_to("a.png")
    for name in (".env", ".aws/a.png", "b.png", "open/a.png", ".link.png", f"{tmp_path}/.env", ".aws/../a.png"):
        assert "a hidden file" in str(find_image(str(tmp_path), name)), name
    assert isinstance(find_image(str(tmp_path), "./a.png"), FoundImage)
    hidden = tmp_path / ".cache"                        # the manifest's own folder may be hidden: a person has named it
    hidden.mkdir()
    (hidden / "a.png").write_bytes(png())
    assert isinstance(find_image(str(hidden), "a.png"), FoundImage)
    assert isinstance(find_image(str(hidden), f"{hidden}/a.png"), FoundImage)
    for name in (".env", "a/.b/c.png"):
        with pytest.raises(ImageError, match="hidden"):
            locate_image("s3://b/night", name)
        with pytest.raises(ImageError, match="hidden"):
            locate_image("s3://bbb/night", f"s3://bbb/{name}")


def test_images_of_a_bucket_are_read_for_its_own_manifests_and_where_it_was_allowed():
    for folder, name, allowed in [("s3://bbb/night", "s3://bbb/other/a.png", []),
                                  ("s3://bbb/night", "S3A://bbb/a.png", []),
                                  ("/disk", "s3://ccc/in/a.png", ["s3://ccc/in"]),
                                  ("/disk", "s3://ccc/in/a.png", ["S3://ccc/in/"]),
                                  ("/disk", "s3://ccc/a.png", ["s3://xxx", "s3://ccc"]),
                                  ("s3://bbb/night", "s3://ccc/in/deep/a.png", ["s3://ccc/in"])]:
        assert locate_image(folder, name, allowed).startswith("s3://")
    for folder, name, allowed in [("s3://bbb/night", "s3://ccc/a.png", []), ("s3://bbb/night", "s3://bbbb/a.png", []),
                                  ("/disk", "s3://ccc/a.png", []), ("/disk", "s3://ccc/inner/a.png", ["s3://ccc/in"]),
                                  ("/disk", "s3://ccc/in/../a.png", ["s3://ccc/in"]),
                                  ("s3://bbb/night", "s3://b.c/a.png", ["s3://ccc"])]:
        with pytest.raises(ImageError, match="--allow-images s3://BUCKET/PREFIX has to allow it"):
            locate_image(folder, name, allowed)


def test_a_key_leads_to_no_other_bucket_and_to_nothing_hidden_below_an_allowed_prefix():
    """A server that tidies paths reads /bbb/../ccc/a.png as another bucket, with the driver's credentials."""
    for name in ("s3://bbb/../ccc/a.png", "s3://bbb/in/./a.png", "s3://bbb/in/.."):
        with pytest.raises(ImageError, match="a key with . or .. in it"):
            locate_image("s3://bbb/night", name)
    with pytest.raises(ImageError, match="a hidden file"):
        locate_image("/disk", "s3://ccc/in/.aws/a.png", ["s3://ccc/in"])
    assert locate_image("/disk", "s3://ccc/.in/a.png", ["s3://ccc/.in"]) == "s3://ccc/.in/a.png"


def test_a_link_that_is_put_in_the_way_after_the_check_is_not_followed(tmp_path, monkeypatch):
    from dailies.pipeline.manifest import images
    (tmp_path / "night/deep").mkdir(parents=True)
    (tmp_path / "night/deep/a.png").write_bytes(png())
    (tmp_path / "a.png").write_bytes(png())
    checked = locate_image(str(tmp_path / "night"), "deep/a.png")
    for place, target in (("deep/a.png", tmp_path / "a.png"), ("deep", tmp_path)):
        path = tmp_path / "night" / place
        path.unlink() if path.is_file() else path.rmdir()
        path.symlink_to(target)
        with pytest.raises(ImageError, match="not a file: a link"):
            images.read_image(checked, str(tmp_path / "night"))
        path.unlink()
        path.parent.mkdir(exist_ok=True)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def exif_table(entries: int, size: int) -> bytes:
    """Every entry claims the whole table."""
    entry = struct.pack("<HHII", 0x9000, 7, size, 8)
    return (b"II*\0" + struct.pack("<IH", 8, entries) + entry * entries).ljust(size + 8, b"\0")


def many_scans(count: int, side: int = 64) -> bytes:
    data = encoded(Image.new("L", (side, side), 128), "jpeg", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * count + b"\xff\xd9"


def animated(frames: int) -> bytes:
    data = encoded(Image.fromarray(pixels()), "webp", save_all=True, append_images=[Image.new("RGB", (60, 40))])
    last = data.rindex(b"ANMF")
    body = data[12:] + data[last:] * (frames - 2)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


BOMBS = {
    "scans": (many_scans(120), "a JPEG of more than 100 scans"),
    "segments": (jpeg()[:2] + b"\xff\xfe\0\2" * 60_000 + jpeg()[2:], "a JPEG of more than 50,000 segments"),
    "fill": (jpeg()[:2] + b"\xff" * 9_000_000 + b"\0" + jpeg()[2:], "not a PNG, JPEG or WebP, but a damaged JPEG"),
    "chunks": (png()[:33] + chunk(b"IDAT", b"") * 60_000 + png()[33:], "a PNG of more than 50,000 chunks"),
    "frames": (animated(60_000), "a WebP of more than 50,000 chunks"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_that_is_much_work_is_refused_before_it_is_opened(name, monkeypatch):
    data, said = BOMBS[name]
    if name != "fill":
        monkeypatch.setattr(Image, "open", None)
        assert len(list(raised(decode_image, data))) == 1
    [error] = raised(examine, data)
    assert re.match(said, str(error))


def test_scans_are_counted_over_the_pixels_that_each_passes(monkeypatch):
    assert examine(many_scans(60)) == ImageSize(height=64, width=64)
    monkeypatch.setattr(image_file, "MAX_SCANNED", 64 * 64 * 60)
    with pytest.raises(ImageError, match="a JPEG of [67]. scans over 64x64 pixels"):
        examine(many_scans(60))


def test_what_decides_no_pixel_does_not_reach_the_decoder():
    """Texts that unfold, colour profiles, EXIF of which every entry names all of it, frames behind the first."""
    bomb = zlib.compress(b"\0" * 30_000_000)
    head, rest = png()[:33], png()[33:]
    swollen = head + chunk(b"zTXt", b"a\0\0" + bomb) * 9 + chunk(b"iCCP", b"p\0\0" + bomb) * 9 + \
        chunk(b"eXIf", exif_table(65_000, 1_000_000)) + rest
    data = {"png": swollen,
            "jpeg": jpeg()[:2] + (b"\xff\xe1\xff\xf0Exif\0\0" + exif_table(5_000, 64_000).ljust(65_512, b"\0")) * 20
            + jpeg()[2:], "webp": animated(10_000)}
    for kind, swollen in data.items():
        image, parts = image_file.opened_image(swollen)
        assert len(parts.data) < 30_000 and image.size == (60, 40), kind
        assert off(decode_image(swollen), pixels()) <= 8 if kind != "webp" else examine(swollen)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_an_orientation_in_xmp_counts_where_exif_says_none(kind):
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    if kind == "png":
        data = png()[:33] + chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp) + png()[33:]
    else:
        data = encoded(Image.fromarray(pixels()), kind, xmp=xmp)
    assert examine(data) == ImageSize(height=60, width=40) and decode_image(data).shape == (3, 60, 40)


@pytest.mark.parametrize("data", [
    encoded(Image.fromarray(np.dstack([pixels()] * 1)), "png", compress_level=0), jpeg(comment=b"x" * 60_000),
    jpeg(icc_profile=b"p" * 900_000), encoded(Image.fromarray(pixels()), "png", icc_profile=b"p" * 900_000),
    encoded(Image.fromarray(pixels()), "webp", icc_profile=b"p" * 900_001, xmp=b"x" * 3), see_through(),
    encoded(Image.fromarray(pixels()), "jpeg", restart_marker_blocks=1)], ids=lambda data: str(len(data)))
def test_what_is_taken_out_of_a_file_changes_no_pixel_of_it(data):
    image = Image.open(BytesIO(data))
    whole = image.convert("RGBA") if image.mode == "RGBA" else image.convert("RGB")
    if whole.mode == "RGBA":
        whole = Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole).convert("RGB")
    assert off(decode_image(data), np.asarray(whole)) <= 1e-4


@pytest.mark.parametrize("place", ["IHDR", "IDAT", "IEND"])
def test_a_png_that_was_damaged_on_the_way_is_refused_and_not_drawn_as_far_as_it_goes(place):
    data = bytearray(png())
    data[{"IHDR": 17, "IDAT": data.index(b"IEND") - 12, "IEND": len(data) - 1}[place]] ^= 1
    assert examine(png())
    with pytest.raises(ImageError, match="a damaged part: its checksum is another"):
        examine(bytes(data))
