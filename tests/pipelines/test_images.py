import io
import struct
import zlib

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipelines import images
from pipelines.config import LimitsConfig


def encoded(form, mode="RGB", size=(24, 16)):
    picture = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(picture, "RGBA").convert(mode).save(buffer, form)
    return buffer.getvalue()


def png_of_size(width, height):
    """A PNG whose header promises a size; it holds no pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_whole_image_is_ok_with_its_size_and_format(form):
    assert images.read_header(encoded(form)) == images.Header(24, 16, form, "ok", None)


def test_no_bytes_is_a_status_with_a_reason():
    header = images.read_header(None)
    assert (header.status, header.width) == ("no_bytes", None)
    assert header.reason


@pytest.mark.parametrize("data", [b"no image", b"\xff\xd8\xff\xe0 broken header", b"\x89PNG\r\n\x1a\n"])
def test_a_broken_header_is_unreadable_and_says_how_many_bytes_there_were(data):
    header = images.read_header(data)
    assert header.status == "unreadable"
    assert f"{len(data)} bytes" in header.reason


def test_zero_bytes_are_unreadable_and_called_so():
    assert images.read_header(b"") == images.Header(None, None, None, "unreadable", "zero bytes")


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_an_image_that_was_cut_is_truncated_but_keeps_its_size(form):
    data = encoded(form, size=(96, 64))
    header = images.read_header(data[: len(data) * 2 // 3])
    assert (header.status, header.width, header.height) == ("truncated", 96, 64)
    assert "end marker" in header.reason


def test_padding_behind_the_end_marker_is_no_truncation():
    assert images.read_header(encoded("JPEG") + b"\0" * 512).status == "ok"


@pytest.mark.parametrize("size", [(9_000, 8_000), (30_000, 30_000)])
def test_an_image_beyond_the_pixel_limit_is_too_large_however_far_beyond(size):
    header = images.read_header(png_of_size(*size))
    assert (header.status, header.width, header.height) == ("too_large", *size)
    assert f"{size[0]}x{size[1]} pixels, limit limits.max_image_pixels = 64000000" in header.reason


def test_an_image_at_the_pixel_limit_is_ok():
    assert images.read_header(png_of_size(8_000, 8_000)).status == "ok"


@pytest.mark.parametrize("size", [(16_385, 2), (2, 16_385)])
def test_an_image_with_too_long_a_side_is_too_large_and_one_at_the_limit_is_ok(size):
    header = images.read_header(png_of_size(*size))
    assert header.status == "too_large"
    assert "limit limits.max_image_side = 16384" in header.reason
    assert images.read_header(png_of_size(*(min(s, 16_384) for s in size))).status == "ok"


def test_an_image_of_too_many_bytes_is_too_large_and_one_at_the_limit_is_ok():
    data = encoded("PNG")
    header = images.read_header(data, LimitsConfig(max_image_bytes=len(data) - 1))
    assert (header.status, header.width, header.format) == ("too_large", None, None)
    assert header.reason == f"{len(data)} bytes, limit limits.max_image_bytes = {len(data) - 1}"
    assert images.read_header(data, LimitsConfig(max_image_bytes=len(data))).status == "ok"


def test_the_configured_limits_hold_in_both_directions():
    data = png_of_size(24, 16)
    assert images.read_header(data, LimitsConfig(max_image_pixels=24 * 16)).status == "ok"
    header = images.read_header(data, LimitsConfig(max_image_pixels=24 * 16 - 1))
    assert (header.status, header.width, header.height) == ("too_large", 24, 16)
    assert "limits.max_image_pixels = 383" in header.reason
    assert "limits.max_image_side = 23" in images.read_header(data, LimitsConfig(max_image_side=23)).reason
    roomy = LimitsConfig(max_image_pixels=10**9, max_image_side=30_000)
    assert images.read_header(png_of_size(30_000, 30_000), roomy).status == "ok"


@pytest.mark.parametrize("size", [(24, 16), (96, 64)])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"])
def test_a_whole_image_in_an_arrow_buffer_is_ok(form, size):
    data = encoded(form, size=size)
    assert images.read_header(pa.py_buffer(data)) == images.Header(*size, form, "ok", None)


@pytest.mark.parametrize("damage", [lambda d: d[:-20], lambda d: d[:30], lambda d: b"no image", lambda d: b""])
def test_a_damaged_image_in_an_arrow_buffer_is_what_it_is_as_bytes(damage):
    for form in ("JPEG", "PNG"):
        data = damage(encoded(form))
        assert images.read_header(pa.py_buffer(data)) == images.read_header(data)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "LA"])
def test_every_mode_decodes_to_rgb(mode):
    image = images.decode_rgb(encoded("PNG", mode))
    assert (image.mode, image.size) == ("RGB", (24, 16))


def test_alpha_is_dropped_without_blending():
    picture = np.zeros((2, 2, 4), np.uint8)
    picture[..., 0] = 200
    buffer = io.BytesIO()
    Image.fromarray(picture, "RGBA").save(buffer, "PNG")
    assert (np.asarray(images.decode_rgb(buffer.getvalue())) == (200, 0, 0)).all()


def test_the_orientation_tag_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (24, 16)).save(buffer, "JPEG", exif=exif)
    assert images.decode_rgb(buffer.getvalue()).size == (24, 16)


def test_pixels_that_cannot_be_decoded_raise_one_error_whatever_the_format():
    jpeg, png = encoded("JPEG", size=(96, 64)), encoded("PNG", size=(96, 64))
    middle = png.index(b"IDAT") + 8
    for data in (jpeg[: len(jpeg) // 2], png[:middle] + bytes(40) + png[middle + 40 :], b"", b"no image"):
        with pytest.raises(images.UndecodableImage):
            images.decode_rgb(data)
