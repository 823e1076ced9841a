"""load_image on every kind of picture, and on files that are not pictures."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image

from effdet.data import ImageError, load_image

GREY = np.linspace(0, 65535, 40 * 30).round().astype(np.uint16).reshape(30, 40)


def _noise(channels: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (30, 40, channels), dtype=np.uint8)


def test_rgb_is_unchanged(tmp_path):
    Image.fromarray(_noise(3)).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(load_image(tmp_path / "a.png")), _noise(3))


def test_file_object(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(_noise(3)).save(buffer, "PNG")
    buffer.seek(0)
    assert np.array_equal(np.asarray(load_image(buffer)), _noise(3))


def test_greyscale_fills_three_channels(tmp_path):
    Image.fromarray(_noise(1)[..., 0]).save(tmp_path / "a.png")
    pixels = np.asarray(load_image(tmp_path / "a.png"))
    assert np.array_equal(pixels, np.repeat(_noise(1), 3, axis=2))


def test_alpha_is_dropped(tmp_path):
    Image.fromarray(_noise(4), "RGBA").save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(load_image(tmp_path / "a.png")), _noise(4)[..., :3])


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        *(("1", "png"), ("L", "jpg"), ("L", "bmp"), ("LA", "png"), ("P", "gif"), ("P", "png")),
        *(("CMYK", "jpg"), ("CMYK", "tif"), ("YCbCr", "tif"), ("YCbCr", "jpg"), ("RGBA", "tif")),
    ],
)
def test_every_mode_gives_rgb(tmp_path, mode, suffix):
    image = Image.new("RGB", (40, 30), (240, 240, 255)).convert(mode)
    image.save(tmp_path / f"a.{suffix}")
    loaded = load_image(tmp_path / f"a.{suffix}")
    assert loaded.mode == "RGB"
    error = np.asarray(loaded, dtype=int)[..., :2] - np.asarray(image.convert("RGB"))[..., :2]
    assert abs(error).max() <= (4 if suffix == "jpg" else 0)


def test_palette_with_transparency(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    image.save(tmp_path / "a.png", transparency=b"\x00\x80")
    assert load_image(tmp_path / "a.png").getpixel((0, 0)) == (10, 200, 30)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_are_scaled_not_clipped(tmp_path, suffix):
    Image.fromarray(GREY).save(tmp_path / f"a.{suffix}")
    pixels = np.asarray(load_image(tmp_path / f"a.{suffix}"))[..., 0]
    assert np.array_equal(pixels, (GREY / 257).round().astype(np.uint8))
    assert pixels.min() == 0 and pixels.max() == 255


def test_32_bits_and_floats_are_refused(tmp_path):
    Image.fromarray(np.full((3, 3), 70000, dtype=np.int32)).save(tmp_path / "int.tif")
    Image.fromarray(np.full((3, 3), 0.5, dtype=np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ImageError, match=r"int\.tif: 32-bit samples up to 70000"):
        load_image(tmp_path / "int.tif")
    with pytest.raises(ImageError, match=r"float\.tif: .*floating-point"):
        load_image(tmp_path / "float.tif")


def test_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned; upright after a quarter turn clockwise
    image = Image.fromarray(_noise(3))
    image.save(tmp_path / "a.png", exif=exif)
    upright = np.asarray(load_image(tmp_path / "a.png"))
    assert np.array_equal(upright, np.rot90(_noise(3), -1))
    assert np.array_equal(np.asarray(load_image(tmp_path / "a.png", exif=False)), _noise(3))


def test_long_image(tmp_path):
    Image.new("RGB", (20_000, 20), (9, 9, 9)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").size == (20_000, 20)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("kept", [0, 10, 0.3, 0.9])
def test_truncated_file_is_named(tmp_path, suffix, kept):
    path = tmp_path / f"photo.{suffix}"
    Image.fromarray(_noise(3)).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept if kept in (0, 10) else kept * len(content))])
    with pytest.raises(ImageError, match=rf"photo\.{suffix}.*expected a complete image"):
        load_image(path)


def test_not_an_image(tmp_path):
    (tmp_path / "notes.jpg").write_text("dear diary")
    with pytest.raises(ImageError, match=r"notes\.jpg"):
        load_image(tmp_path / "notes.jpg")


def test_a_format_that_pillow_knows_in_part(tmp_path):
    sizes = struct.pack("<7I44x", 124, 0x1007, 4, 4, 0, 0, 0)
    pixels = struct.pack("<2I4s5I20x", 32, 4, b"WHAT", 0, 0, 0, 0, 0)
    (tmp_path / "texture.dds").write_bytes(b"DDS " + sizes + pixels)
    with pytest.raises(ImageError, match=r"texture\.dds: Unimplemented"):
        load_image(tmp_path / "texture.dds")


def test_decompression_bomb(tmp_path, monkeypatch):
    Image.new("L", (100, 100)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match=r"bomb\.png"):
        load_image(tmp_path / "bomb.png")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        load_image(tmp_path / "absent.jpg")
    with pytest.raises(OSError):
        load_image(tmp_path)
