"""Hostile raw files in every layout: each ends as an error that names the file, or as rows and images with a reason.

A case writes raw files by code and says what must become of them. All cases share one store; a catalogue is built over
everything that was ingested. What holds for every case stands once, in `test_a_hostile_file_...`.
"""

import base64
import contextlib
import functools
import gzip
import hashlib
import io
import itertools
import json
import os
import signal
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines import catalogue, images, ingest, schemas, stored
from pipelines.config import LimitsConfig, SourceConfig
from pipelines.sources import SourceError
from pipelines.tables import Store

SECONDS_PER_CASE = 20


# --- what a case is ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refused:
    """The shard ends as a SourceError whose message has the file's name and these words."""

    file: str
    said: str


@dataclass(frozen=True)
class Rows:
    """The source is ingested. votes: statuses of all votes; images: those of images that are not ok; said: in a reason."""

    rows: int
    votes: str
    images: str = ""
    said: str = ""


@dataclass(frozen=True)
class Case:
    name: str
    layout: str
    write: Callable[[Path], None]
    expected: Refused | Rows
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    has_sibling: bool = False
    """The source has a good second shard of two rows, `good...`."""


CASES: list[Case] = []


def case(name, layout, expected, **more):
    """Register the decorated function, which writes raw files into a folder, as a case."""

    def add(write):
        CASES.append(Case(name, layout, write, expected, **more))
        return write

    return add


# --- pictures ------------------------------------------------------------------------------------------------------


@functools.cache
def picture(seed, size=(48, 48)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


@functools.cache
def encoded(form, mode="RGB", seed=0, **options):
    buffer = io.BytesIO()
    picture(seed).convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


def jpeg(seed, **options):
    return encoded("JPEG", seed=seed, **options)


SECRET = jpeg(777)
"""A picture outside the source, at which hostile names aim: it must never be in the store."""


def png(width, height, *chunks, bits=8, colour=2, data=b"\0" * 64, end=True):
    """Return a PNG of these chunks whatever its header claims."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    body = b"".join(chunk(*c) for c in chunks) + chunk(b"IDAT", zlib.compress(data))
    return b"\x89PNG\r\n\x1a\n" + header + body + (chunk(b"IEND", b"") if end else b"")


def tiff_of_size(width, height):
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    entries += [(273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, 16)]
    listed = b"".join(struct.pack("<HHII", *e) for e in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + listed + struct.pack("<I", 0) + b"\0" * 16


def ico_around(data):
    """Return an icon that claims 16x16 pixels and holds another picture."""
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(data), 22) + data


def animated(form):
    buffer = io.BytesIO()
    picture(1).save(buffer, form, save_all=True, append_images=[picture(2), picture(3)], duration=50, loop=0)
    return buffer.getvalue()


def in_the_middle(data, put, at=0.6):
    where = int(len(data) * at)
    return data[:where] + put + data[where + len(put) :]


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return jpeg(5, exif=exif.tobytes())


def palette_with_alpha():
    buffer = io.BytesIO()
    picture(6).convert("P").save(buffer, "PNG", transparency=bytes(range(256)))
    return buffer.getvalue()


def sixteen_bit():
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(7).integers(0, 65536, (48, 48), dtype=np.uint16)).save(buffer, "PNG")
    return buffer.getvalue()


def long_png(width, height):
    buffer = io.BytesIO()
    Image.new("L", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def damaged_ihdr(data):
    return data[:20] + bytes([data[20] ^ 1]) + data[21:]


BOMB = zlib.compress(b"a" * 30_000_000, 9)
"""30 kB that are 30 MB."""
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 48 48\n%%EndComments\n(/tmp/evil) (w) file pop\nshowpage\n%%EOF\n"
HTML = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"


@dataclass(frozen=True)
class Payload:
    """Bytes in the place of an image. decodes: None where a decoder may give a picture or not."""

    name: str
    data: bytes
    status: str
    said: str = ""
    decodes: bool | None = None


def ok(name, data, decodes=True):
    return Payload(name, data, "ok", decodes=decodes)


PAYLOADS = (
    # Damaged or no image at all.
    Payload("zero_bytes", b"", "unreadable", "zero bytes"),
    Payload("one_byte", b"\xff", "unreadable", "no image format recognised in 1 bytes"),
    Payload("soi_only", b"\xff\xd8", "unreadable", "no image format recognised"),
    Payload("soi_and_eoi", b"\xff\xd8\xff\xd9", "unreadable", "no image format recognised"),
    Payload("html", HTML, "unreadable", "no image format recognised"),
    Payload("nul_bytes", b"\0" * 4096, "unreadable", "no image format recognised"),
    Payload("random_bytes", np.random.default_rng(9).bytes(4096), "unreadable", "no image format recognised"),
    Payload(
        "svg", b'<svg xmlns="http://www.w3.org/2000/svg" width="48" height="48"/>', "unreadable", "no image format"
    ),
    Payload("eps_program", EPS, "unreadable", "no image format recognised"),
    Payload("pdf", b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\n%%EOF", "unreadable", "no image format recognised"),
    Payload("jpeg_cut_in_header", jpeg(10)[:20], "unreadable", "no image format recognised"),
    Payload("jpeg_cut_after_header", jpeg(11)[:700], "truncated", "JPEG without end marker"),
    Payload("jpeg_cut_in_half", jpeg(12)[: len(jpeg(12)) // 2], "truncated", "JPEG without end marker"),
    Payload("jpeg_cut_before_eoi", jpeg(13)[:-2], "truncated", "JPEG without end marker"),
    ok("jpeg_garbled", in_the_middle(jpeg(14), bytes(range(64))), None),
    ok("jpeg_hole", jpeg(15)[:900] + jpeg(15)[-200:], None),
    ok("jpeg_bad_huffman", jpeg(16).replace(b"\xff\xc4", b"\xff\xc4\0\x14" + b"\xff" * 18, 1), None),
    Payload("jpeg_no_pixels", jpeg(17)[:620] + b"\xff\xd9", "unreadable", "no image format recognised"),
    ok("jpeg_padded", jpeg(18) + b"\0" * 500),
    Payload("jpeg_long_garbage_after_eoi", jpeg(19) + b"garbage" * 500, "truncated", "JPEG without end marker"),
    ok("jpeg_twice", jpeg(20) + jpeg(21)),
    Payload(
        "jpeg_of_zero_size",
        jpeg(22).replace(b"\x00\x30\x00\x30\x03", b"\x00\x00\x00\x00\x03", 1),
        "unreadable",
        "no image format",
    ),
    Payload("png_cut", encoded("PNG", seed=30)[:-40], "truncated", "PNG without end marker"),
    Payload("png_wrong_crc", damaged_ihdr(encoded("PNG", seed=31)), "unreadable", "no image format recognised"),
    ok("png_wrong_crc_of_pixels", in_the_middle(encoded("PNG", seed=32), b"\0\1\2\3"), None),
    ok("png_short_pixels", png(48, 48), False),
    ok("png_pixels_too_many", png(2, 2, data=b"\0" * 1_000_000), None),
    Payload("png_without_end", png(48, 48, data=b"\0" * 48 * 145, end=False), "truncated", "PNG without end marker"),
    Payload("png_no_chunks", b"\x89PNG\r\n\x1a\n", "unreadable", "no image format recognised"),
    Payload("webp_cut", encoded("WEBP", seed=33)[:-300], "unreadable", "no image format recognised"),
    ok("gif_garbled", in_the_middle(encoded("GIF", seed=34), bytes(range(50, 120))), None),
    Payload("gif_cut", encoded("GIF", seed=35)[:-600], "truncated", "GIF without end marker"),
    ok("avif_garbled", in_the_middle(encoded("AVIF", seed=36), bytes(64), 0.4), None),
    Payload("avif_cut", encoded("AVIF", seed=37)[:-300], "unreadable", "no image format recognised"),
    Payload(
        "avif_without_item", encoded("AVIF", seed=38).replace(b"av01", b"av99", 1), "unreadable", "no image format"
    ),
    ok("bmp_cut", encoded("BMP", seed=39)[:-500], False),
    ok("tiff_cut", encoded("TIFF", seed=40)[:-4000], None),
    ok("jpeg2000_cut", encoded("JPEG2000", seed=41)[:-500], None),
    # Bombs.
    Payload(
        "png_30000_pixels_square", png(30_000, 30_000), "too_large", "30000x30000 pixels, limit limits.max_image_pixels"
    ),
    Payload(
        "png_30000_pixels_long", long_png(30_000, 100), "too_large", "30000x100 pixels, limit limits.max_image_side"
    ),
    Payload("png_of_2_31_pixels", png(2**31 - 1, 2**31 - 1), "too_large", "limits.max_image_pixels"),
    Payload("png_of_2_32_pixels", png(2**32 - 1, 1), "too_large", "4294967295x1 pixels, limit limits.max_image_pixels"),
    Payload("tiff_of_2_32_pixels", tiff_of_size(2**32 - 1, 1), "too_large", "4294967295x1 pixels"),
    Payload(
        "jpeg_65535_pixels_square",
        jpeg(42).replace(b"\x00\x30\x00\x30\x03", b"\xff\xff\xff\xff\x03", 1),
        "too_large",
        "65535x65535",
    ),
    Payload("png_text_bomb", png(48, 48, (b"zTXt", b"k\0\0" + BOMB)), "unreadable", "too large"),
    Payload("png_international_text_bomb", png(48, 48, (b"iTXt", b"k\0\1\0\0\0" + BOMB)), "unreadable", "too large"),
    Payload("png_profile_bomb", png(48, 48, (b"iCCP", b"k\0\0" + BOMB)), "unreadable", "too large"),
    ok("png_pixel_bomb", png(48, 48, data=b"\0" * 30_000_000), None),
    Payload("icon_with_a_bomb", ico_around(long_png(9000, 9000)), "unreadable", "no image format recognised"),
    # Strange but whole.
    ok("png_named_jpg", encoded("PNG", seed=50)),
    ok("webp_named_jpg", encoded("WEBP", seed=51)),
    ok("gif_animated", animated("GIF")),
    ok("webp_animated", animated("WEBP")),
    ok("png_animated", animated("PNG")),
    ok("jpeg_cmyk", encoded("JPEG", "CMYK", seed=52)),
    ok("jpeg_grey", encoded("JPEG", "L", seed=53)),
    ok("jpeg_progressive", jpeg(54, progressive=True)),
    ok("jpeg_rotated_by_exif", rotated()),
    ok("jpeg_with_damaged_exif", jpeg(55, exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")),
    ok("jpeg_multi_picture", animated("MPO")),
    ok("png_16_bit", sixteen_bit()),
    ok("png_1_bit", encoded("PNG", "1", seed=56)),
    ok("png_alpha", encoded("PNG", "RGBA", seed=57)),
    ok("png_grey_alpha", encoded("PNG", "LA", seed=58)),
    ok("png_palette_with_alpha", palette_with_alpha()),
    ok("png_palette_without_palette", png(2, 2, colour=3, data=b"\0\0\0\0\0\0"), None),
    ok("png_one_pixel", png(1, 1, data=b"\0abc")),
    ok("tiff", encoded("TIFF", seed=59)),
    ok("tiff_cmyk", encoded("TIFF", "CMYK", seed=60)),
    ok("tiff_float", encoded("TIFF", "F", seed=61)),
    ok("bmp", encoded("BMP", seed=62)),
    ok("jpeg2000", encoded("JPEG2000", seed=63)),
    ok("avif", encoded("AVIF", seed=64)),
)


# --- containers: one way of writing images per layout and kind of file ---------------------------------------------


def prompt(i):
    return f"a prompt of number {i}"


def pickapic_columns(n, start=0):
    """Return the columns of n good rows in Pick-a-Pic's layout."""
    at = range(start, start + n)
    return {
        "caption": pa.array([prompt(i) for i in at]),
        "created_at": pa.array([datetime(2023, 1, 1, 0, i % 60) for i in at], pa.timestamp("ns")),
        "has_label": pa.array([True] * n),
        "image_0_uid": pa.array([f"left-{i}" for i in at]),
        "image_1_uid": pa.array([f"right-{i}" for i in at]),
        "jpg_0": pa.array([jpeg(1000 + i) for i in at], pa.binary()),
        "jpg_1": pa.array([jpeg(2000 + i) for i in at], pa.binary()),
        "label_0": pa.array([float(i % 2) for i in at]),
        "label_1": pa.array([float(1 - i % 2) for i in at]),
        "model_0": pa.array(["m"] * n),
        "model_1": pa.array(["n"] * n),
        "ranking_id": pa.array(list(at), pa.int64()),
        "user_id": pa.array(list(at), pa.int64()),
    }


def pairs_columns(n, start=0):
    at = range(start, start + n)
    return {
        "prompt": pa.array([prompt(i) for i in at]),
        "image_0": pa.array([jpeg(1000 + i) for i in at], pa.binary()),
        "image_1": pa.array([jpeg(2000 + i) for i in at], pa.binary()),
        "label_0": pa.array([float(i % 2) for i in at]),
        "annotator": pa.array([f"person {i}" for i in at]),
        "created_at": pa.array([datetime(2023, 1, 1, 0, i % 60) for i in at], pa.timestamp("us")),
    }


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def rapidata_columns(n, start=0):
    at = range(start, start + n)
    return {
        "prompt": pa.array([prompt(i) for i in at]),
        "image1": pa.array([{"bytes": jpeg(1000 + i), "path": f"left-{i}.jpg"} for i in at], STRUCT),
        "image2": pa.array([{"bytes": jpeg(2000 + i), "path": f"right-{i}.jpg"} for i in at], STRUCT),
        "votes_image1": pa.array([2 + i for i in at], pa.int64()),
        "votes_image2": pa.array([0] * n, pa.int64()),
        "detailed_results": pa.array([None] * n, pa.string()),
    }


COLUMNS = {"pickapic": pickapic_columns, "pairs": pairs_columns, "rapidata": rapidata_columns}


def write_parquet(file, columns, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_arrays(list(columns.values()), list(columns)), file, **options)


def member(name, data=b"", **fields):
    """Return a tar's member; fields of TarInfo may contradict the bytes."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def tar_bytes(members, form=tarfile.GNU_FORMAT, end=True):
    """Return a tar of these members, whatever their headers claim."""
    parts = []
    for info, data in members:
        parts += [info.tobuf(form, "utf-8", "surrogateescape"), data, b"\0" * (-len(data) % 512)]
    return b"".join(parts) + (b"\0" * 1024 if end else b"")


def sample(key, image_0, image_1, text=b"a prompt", label=b"1.0", **replaced):
    """Return the members of a WebDataset sample; replaced: other members by extension with '_' for '.', None for none."""
    named = {
        "original_prompt.txt": member(f"{key}.original_prompt.txt", text),
        "jpg_0.jpg": member(f"{key}.jpg_0.jpg", image_0),
        "jpg_1.jpg": member(f"{key}.jpg_1.jpg", image_1),
        "label_0.txt": member(f"{key}.label_0.txt", label),
    }
    for extension, other in replaced.items():
        named[{"jpg_0": "jpg_0.jpg", "jpg_1": "jpg_1.jpg", "words": "original_prompt.txt"}[extension]] = other
    return [m for m in named.values() if m is not None]


def good_samples(n, start=0):
    return [m for i in range(start, start + n) for m in good_sample(i)]


def good_sample(i, **replaced):
    return sample(f"{i:05d}", jpeg(1000 + i), jpeg(2000 + i), prompt(i).encode(), **replaced)


def hpd_record(i, first=None, second=None, **fields):
    files = [first or f"{i}-left.jpg", second or f"{i}-right.jpg"]
    return {"prompt": prompt(i), "file_path": files, "human_preference": [1, 0], **fields}


def hpd_group(i, files, raters=2, **fields):
    ranks = list(range(1, len(files) + 1))
    listed = [{"rank": ranks, "user_hash": f"person {r}"} for r in range(raters)]
    return {"prompt": prompt(i), "image_path": files, "raw_annotations": listed, **fields}


def hpdv3_record(i, first=None, second=None, **fields):
    paths = {"path1": first or f"images/{i}-left.jpg", "path2": second or f"images/{i}-right.jpg"}
    return {
        "prompt": prompt(i),
        **paths,
        "choice_dist": [3, 0],
        "confidence": 0.9,
        "model1": "m",
        "model2": "n",
        **fields,
    }


def write_json(file, value):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())


def write_images(raw, kind, named, folder="train"):
    """Write images {name: bytes} as a folder, a tar or a tar.gz."""
    if kind == "folder":
        for name, data in named.items():
            (raw / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (raw / folder / name).write_bytes(data)
        return
    content = tar_bytes([member(f"{folder}/{name}", data) for name, data in named.items()])
    (raw / f"{folder}.{kind}").write_bytes(content if kind == "tar" else gzip.compress(content, 1))


def good_images(n, start=0):
    at = range(start, start + n)
    return {f"{i}-{side}.jpg": jpeg(s + i) for i in at for side, s in (("left", 1000), ("right", 2000))}


def in_parquet(layout, column, wrap=lambda data: data):
    """Return a writer of payloads as the first images of rows."""

    def write(raw, payloads):
        columns = COLUMNS[layout](len(payloads))
        columns[column] = pa.array([wrap(p) for p in payloads])
        write_parquet(raw / "data" / "bad.parquet", columns, row_group_size=7)

    return write


def _as_base64(data):
    return base64.b64encode(data).decode()


def in_pairs_by_path(raw, payloads):
    columns = pairs_columns(len(payloads))
    for i, data in enumerate(payloads):
        write_images(raw, "folder", {f"{i}.jpg": data, f"{i}-right.jpg": jpeg(2000 + i)}, "pictures")
    columns["image_0"] = pa.array([f"pictures/{i}.jpg" for i in range(len(payloads))])
    columns["image_1"] = pa.array([f"pictures/{i}-right.jpg" for i in range(len(payloads))])
    write_parquet(raw / "bad.parquet", columns)


def in_webdataset(name):
    def write(raw, payloads):
        members = [m for i, p in enumerate(payloads) for m in good_sample(i, jpg_0=member(f"{i:05d}.jpg_0.jpg", p))]
        content = tar_bytes(members)
        (raw / name).write_bytes(content if name.endswith(".tar") else gzip.compress(content, 1))

    return write


def in_hpd(kind):
    def write(raw, payloads):
        write_json(raw / "train.json", [hpd_record(i) for i in range(len(payloads))])
        named = good_images(len(payloads)) | {f"{i}-left.jpg": p for i, p in enumerate(payloads)}
        write_images(raw, kind, named)

    return write


def in_hpdv3(kind):
    def write(raw, payloads):
        write_json(raw / "train.json", [hpdv3_record(i) for i in range(len(payloads))])
        named = good_images(len(payloads)) | {f"{i}-left.jpg": p for i, p in enumerate(payloads)}
        write_images(raw, kind, named, "images")

    return write


CONTAINERS = {
    "pickapic": ("pickapic", in_parquet("pickapic", "jpg_0")),
    "pickapic_base64": ("pickapic", in_parquet("pickapic", "jpg_0", _as_base64)),
    "webdataset_tar": ("pickapic_webdataset", in_webdataset("bad.tar")),
    "webdataset_targz": ("pickapic_webdataset", in_webdataset("bad.tar.gz")),
    "hpd_folder": ("hpd", in_hpd("folder")),
    "hpd_tar": ("hpd", in_hpd("tar")),
    "hpd_targz": ("hpd", in_hpd("tar.gz")),
    "hpdv3_folder": ("hpdv3", in_hpdv3("folder")),
    "hpdv3_tar": ("hpdv3", in_hpdv3("tar")),
    "rapidata": ("rapidata", in_parquet("rapidata", "image1", lambda p: {"bytes": p, "path": None})),
    "pairs_bytes": ("pairs", in_parquet("pairs", "image_0")),
    "pairs_paths": ("pairs", in_pairs_by_path),
}


case(
    "image_of_more_bytes_than_allowed",
    "pairs",
    Rows(2, "ok no_image", said="limits.max_image_bytes = 9000"),
    limits=LimitsConfig(max_image_bytes=9000),
)(lambda raw: in_parquet("pairs", "image_0")(raw, [jpeg(1000), encoded("BMP", seed=70) * 2]))
case(
    "image_file_of_more_bytes_than_allowed",
    "hpd",
    Rows(2, "ok ok", "too_large", "limits.max_image_bytes = 9000"),
    limits=LimitsConfig(max_image_bytes=9000),
)(lambda raw: in_hpd("folder")(raw, [jpeg(1000), encoded("BMP", seed=70) * 2]))


# --- tar files -----------------------------------------------------------------------------------------------------


def tar_case(name, members, expected, kinds=("tar", "tar.gz"), wrap=None):
    """A WebDataset tar of these members (or of these bytes), plain and compressed; beside a good one if it is refused."""
    is_refused = isinstance(expected, Refused)
    for kind in kinds:

        def write(raw, kind=kind):
            content = members() if callable(members) else members
            content = content if isinstance(content, bytes) else tar_bytes(content)
            content = content if kind == "tar" else gzip.compress(content, 1)
            (raw / f"bad.{kind}").write_bytes(content if wrap is None else wrap(content))
            if is_refused:
                (raw / "good.tar").write_bytes(tar_bytes(good_samples(2, 50)))

        here = Refused(f"bad.{kind}", expected.said) if is_refused else expected
        case(f"webdataset_{name}_{kind}", "pickapic_webdataset", here, has_sibling=is_refused)(write)


def middle(**replaced):
    """Return three samples, the middle one with other members."""
    return [*good_sample(0), *good_sample(1, **replaced), *good_sample(2)]


def extra(*members):
    return [*good_sample(0), *members, *good_sample(1)]


IMAGE = "00001.jpg_0.jpg"
DOTS, LINK, SPECIAL = "a path with '..'", "it is a link", "it is no plain file"
tar_case("extra_member_with_dots", extra(member("../../evil.jpg", jpeg(80))), Rows(3, "ok ok unreadable", said="evil"))
tar_case("extra_member_absolute", extra(member("/tmp/abs.jpg", jpeg(80))), Rows(3, "ok ok unreadable", said="abs"))
tar_case(
    "sample_with_dots", [*good_sample(0), *sample("../../x", jpeg(1), jpeg(2))], Rows(2, "ok unreadable", said=DOTS)
)
tar_case(
    "sample_absolute",
    [*good_sample(0), *sample("/tmp/x", jpeg(1), jpeg(2))],
    Rows(2, "ok unreadable", said="an absolute path"),
)
tar_case(
    "sample_with_backslashes",
    [*good_sample(0), *sample("..\\x", jpeg(1), jpeg(2))],
    Rows(2, "ok unreadable", said="no member"),
)
tar_case(
    "image_is_symlink",
    middle(jpg_0=member(IMAGE, type=tarfile.SYMTYPE, linkname="../secret.jpg")),
    Rows(3, "ok ok unreadable", said=LINK),
)
tar_case(
    "image_is_absolute_symlink",
    middle(jpg_0=member(IMAGE, type=tarfile.SYMTYPE, linkname="/etc/passwd")),
    Rows(3, "ok ok unreadable", said=LINK),
)
tar_case(
    "image_is_hardlink",
    middle(jpg_0=member(IMAGE, type=tarfile.LNKTYPE, linkname="00000.jpg_0.jpg")),
    Rows(3, "ok ok unreadable", said=LINK),
)
tar_case("image_is_fifo", middle(jpg_0=member(IMAGE, type=tarfile.FIFOTYPE)), Rows(3, "ok ok unreadable", said=SPECIAL))
tar_case(
    "image_is_device",
    middle(jpg_0=member(IMAGE, type=tarfile.CHRTYPE, devmajor=1, devminor=5)),
    Rows(3, "ok ok unreadable", said=SPECIAL),
)
tar_case(
    "image_is_sparse",
    middle(jpg_0=member(IMAGE, jpeg(81), type=tarfile.GNUTYPE_SPARSE)),
    Rows(3, "ok ok unreadable", said=SPECIAL),
)
tar_case(
    "image_is_a_folder",
    middle(jpg_0=member(IMAGE + "/", type=tarfile.DIRTYPE)),
    Rows(3, "ok ok unreadable", said="no member 'jpg_0.jpg'"),
)
tar_case(
    "text_is_symlink",
    middle(words=member("00001.original_prompt.txt", type=tarfile.SYMTYPE, linkname="/etc/passwd")),
    Rows(3, "ok ok unreadable", said=LINK),
)
tar_case(
    "member_twice", [*middle(), member("00002.jpg_0.jpg", jpeg(82))], Rows(4, "ok ok ok unreadable", said="no member")
)
tar_case("sample_twice", [*good_sample(0), *good_sample(0)], Rows(2, "duplicate_of ok"))
tar_case(
    "samples_interleaved",
    [m for two in zip(good_sample(0), good_sample(1), strict=True) for m in two],
    Rows(8, " ".join(["unreadable"] * 8), said="no member"),
)
tar_case("image_missing", middle(jpg_0=None), Rows(3, "ok ok unreadable", said="no member 'jpg_0.jpg'"))
tar_case(
    "text_of_2_mb",
    [*good_sample(0), *sample("x", jpeg(1), jpeg(2), b"a" * 2_000_000)],
    Rows(2, "ok unreadable", said="limit of texts"),
)
tar_case(
    "text_of_100000_characters", [*good_sample(0), *sample("x", jpeg(1), jpeg(2), b"word " * 20_000)], Rows(2, "ok ok")
)
tar_case(
    "text_not_utf8",
    [*good_sample(0), *sample("x", jpeg(1), jpeg(2), b"caf\xe9")],
    Rows(2, "ok unreadable", said="not valid UTF-8"),
)
tar_case("text_empty", [*good_sample(0), *sample("x", jpeg(1), jpeg(2), b"")], Rows(2, "ok ok"))
tar_case("text_with_nul", [*good_sample(0), *sample("x", jpeg(1), jpeg(2), b"a\0b\x1b[31m")], Rows(2, "ok ok"))
for word, found in (
    (b"nan", "invalid_label"),
    (b"1e999", "invalid_label"),
    (b"-1", "invalid_label"),
    (b"", "unreadable"),
    (b"yes", "unreadable"),
    (b"1" * 5000, "invalid_label"),
):
    tar_case(
        f"label_{word.decode()[:5] or 'empty'}",
        [*good_sample(0), *sample("x", jpeg(1), jpeg(2), label=word)],
        Rows(2, f"ok {found}", said="expected"),
    )
tar_case("name_of_300_characters", [*good_sample(0), *sample("k" * 300, jpeg(1), jpeg(2))], Rows(2, "ok ok"))
tar_case("name_of_3000_characters", [*good_sample(0), *sample("deep/" * 600 + "k", jpeg(1), jpeg(2))], Rows(2, "ok ok"))
tar_case("name_not_utf8", [*good_sample(0), *sample("\udcff\udcfe", jpeg(1), jpeg(2))], Rows(2, "ok ok"))
tar_case("unknown_name_not_utf8", extra(member("\udcff.\udcfe")), Rows(3, "ok ok unreadable", said="no member"))
tar_case(
    "name_in_pax_header",
    lambda: tar_bytes([*good_sample(0), *sample("k" * 300, jpeg(1), jpeg(2))], tarfile.PAX_FORMAT),
    Rows(2, "ok ok"),
)
tar_case(
    "name_with_dots_in_pax_header",
    lambda: tar_bytes([*good_sample(0), *sample("../" * 100 + "x", jpeg(1), jpeg(2))], tarfile.PAX_FORMAT),
    Rows(2, "ok unreadable", said=DOTS),
)
tar_case("extra_text_file", extra(member("README", b"hello")), Rows(3, "ok ok unreadable", said="no member"))
tar_case("no_member", [], Rows(0, ""))
tar_case("folders_only", [member("a/", type=tarfile.DIRTYPE), member("b/", type=tarfile.DIRTYPE)], Rows(0, ""))
tar_case("cut_within_an_image", lambda: tar_bytes(good_samples(3))[:-9000], Refused("", "fetch it again"))
tar_case("cut_between_members", lambda: tar_bytes(good_samples(3), end=False), Refused("", "fetch it again"))
tar_case(
    "cut_within_a_header",
    lambda: tar_bytes(good_samples(3), end=False) + bytes(member("00009.jpg_0.jpg")[0].tobuf())[:200],
    Refused("", "fetch it again"),
)
tar_case(
    "bad_checksum_in_the_middle",
    lambda: tar_bytes(good_samples(1), end=False) + b"garbage!" * 64 + tar_bytes(good_samples(1, 1)),
    Refused("", "fetch it again"),
)
tar_case(
    "bad_checksum_after_zeros",
    lambda: (
        tar_bytes([*good_sample(0), member("00000.pad", b"\0" * 2048)], end=False)
        + b"garbage!" * 64
        + tar_bytes(good_samples(1, 1))
    ),
    Refused("", "fetch it again"),
)
tar_case(
    "bad_checksum_before_zeros",
    lambda: tar_bytes(good_samples(1), end=False) + b"garbage!" * 64 + b"\0" * 512 + tar_bytes(good_samples(1, 1)),
    Refused("", "fetch it again"),
)
tar_case(
    "size_beyond_the_end",
    [*good_sample(0), member("00001.jpg_0.jpg", b"abc", size=50_000)],
    Refused("", "fetch it again"),
)
tar_case(
    "size_of_8_exabytes",
    [*good_sample(0), member("00001.jpg_0.jpg", b"abc", size=2**63 - 1)],
    Refused("", "fetch it again"),
)
tar_case(
    "size_negative",
    [*good_sample(0), member("00001.jpg_0.jpg", b"abc", size=-1024), *good_sample(2)],
    Refused("", "fetch it again"),
)
tar_case(
    "size_negative_in_pax_header",
    lambda: tar_bytes(
        [*good_sample(0), pax_header({"size": "-2048"}), member("00001.jpg_0.jpg", b"abc"), *good_sample(2)]
    ),
    Refused("", "fetch it again"),
)
tar_case(
    "size_in_pax_header_is_no_number",
    lambda: tar_bytes(
        [*good_sample(0), *good_sample(1), pax_header({"size": "many"}), member("x.txt"), *good_sample(2)]
    ),
    Rows(4, "ok ok ok unreadable", said="no member"),
)
tar_case(
    "name_of_70_mb",
    lambda: tar_bytes(
        [*good_sample(0), member("././@LongLink", b"a" * 70_000_000, type=tarfile.GNUTYPE_LONGNAME), *good_sample(1)]
    ),
    Refused("", "fetch it again"),
)
tar_case(
    "pax_header_of_70_mb",
    lambda: tar_bytes(
        [
            *good_sample(0),
            member("x", b"70000000 comment=" + b"a" * 69_999_982 + b"\n", type=tarfile.XHDTYPE),
            *good_sample(1),
        ]
    ),
    Refused("", "fetch it again"),
)
tar_case(
    "names_upon_names",
    lambda: tar_bytes(
        [*good_sample(0), *[member("././@LongLink", b"a", type=tarfile.GNUTYPE_LONGNAME)] * 2000, *good_sample(1)]
    ),
    Refused("", "fetch it again"),
)
tar_case(
    "size_of_8_exabytes_in_pax_header",
    lambda: tar_bytes(
        [*good_sample(0), pax_header({"size": str(2**63)}), member("00001.jpg_0.jpg", b"abc"), *good_sample(2)]
    ),
    Refused("", "fetch it again"),
)
tar_case("html", HTML * 20, Refused("", "fetch it again"))
tar_case("zero_bytes", b"", Refused("", "fetch it again"), kinds=("tar",))
tar_case("one_block_of_zeros", b"\0" * 512, Rows(0, ""), kinds=("tar",))
tar_case(
    "compressed_under_the_name_of_a_plain_one",
    lambda: gzip.compress(tar_bytes(good_samples(2))),
    Refused("", "fetch it again"),
    kinds=("tar",),
)
tar_case(
    "plain_under_the_name_of_a_compressed_one",
    good_samples(2),
    Refused("", "fetch it again"),
    kinds=("tar.gz",),
    wrap=gzip.decompress,
)
tar_case("nothing_compressed", b"", Refused("", "fetch it again"), kinds=("tar.gz",))
tar_case("zero_bytes_compressed", b"", Refused("", "fetch it again"), kinds=("tar.gz",), wrap=lambda content: b"")
for share in (0.1, 0.5, 0.9, 0.999):
    tar_case(
        f"compression_cut_at_{share}",
        good_samples(6),
        Refused("", "fetch it again"),
        kinds=("tar.gz",),
        wrap=lambda content, share=share: content[: int(len(content) * share)],
    )
tar_case(
    "compression_cut_before_its_checksum",
    good_samples(3),
    Refused("", "fetch it again"),
    kinds=("tar.gz",),
    wrap=lambda content: content[:-8],
)
tar_case(
    "compression_with_wrong_checksum",
    good_samples(3),
    Refused("", "fetch it again"),
    kinds=("tar.gz",),
    wrap=lambda content: content[:-8] + b"\1\2\3\4" + content[-4:],
)
tar_case(
    "compression_garbled",
    good_samples(3),
    Refused("", "fetch it again"),
    kinds=("tar.gz",),
    wrap=lambda content: in_the_middle(content, bytes(range(200))),
)
tar_case(
    "compression_with_zeros_behind",
    good_samples(3),
    Rows(3, "ok ok ok"),
    kinds=("tar.gz",),
    wrap=lambda content: content + b"\0" * 700,
)
tar_case(
    "compressed_in_two_parts",
    lambda: tar_bytes(good_samples(2), end=False),
    Rows(3, "ok ok ok"),
    kinds=("tar.gz",),
    wrap=lambda content: content + gzip.compress(tar_bytes(good_samples(1, 2))),
)


@case("webdataset_tar_is_a_broken_link", "pickapic_webdataset", Refused("bad.tar", "No such file"), has_sibling=True)
def _(raw):
    (raw / "bad.tar").symlink_to(raw / "nowhere.tar")
    (raw / "good.tar").write_bytes(tar_bytes(good_samples(2, 50)))


@case("webdataset_file_name_not_utf8", "pickapic_webdataset", Refused("bad", "UTF-8"))
def _(raw):
    Path(os.fsdecode(bytes(raw) + b"/bad\xff.tar")).write_bytes(tar_bytes(good_samples(2)))


@case("webdataset_file_name_strange", "pickapic_webdataset", Rows(2, "ok ok"))
def _(raw):
    (raw / "a [*] {b} ?'\"\n%41#:7 \u202e.tar").write_bytes(tar_bytes(good_samples(2)))


def pax_header(records):
    """Return the extended header (a member) that stands before a member and overrides it."""
    lines = b""
    for key, value in records.items():
        body = f" {key}={value}\n".encode()
        length = len(body) + 2
        lines += f"{length:02d}".encode() + body
    return member("./PaxHeaders/x", lines, type=tarfile.XHDTYPE)


# --- archives and folders of images that JSON names ----------------------------------------------------------------

UNSAFE = {
    "dots": ("../secret.jpg", DOTS),
    "dots_inside": ("a/../../secret.jpg", DOTS),
    "many_dots": ("../" * 40 + "etc/passwd", DOTS),
    "absolute": ("/etc/passwd", "an absolute path"),
    "drive": ("C:\\x.jpg", "an absolute path"),
    "backslashes": ("..\\x.jpg", DOTS),
    "share": ("\\\\server\\share\\x.jpg", "an absolute path"),
    "empty": ("", "an empty name"),
    "nul": ("a\0.jpg", "a name with a NUL character"),
    "address": ("https://example.com/x.jpg", "an address"),
    "file_address": ("file:///etc/passwd", "an address"),
    "chained_address": ("simplecache::file://etc/passwd", "an address"),
}
MISSING = {
    "not_there": ("nowhere.jpg", ""),
    "folder": ("folder.jpg", ""),
    "own_folder": (".", ""),
    "name_of_5000_characters": ("x" * 5000 + ".jpg", ""),
    "below_a_file": ("0-left.jpg/x.jpg", ""),
    "tilde": ("~/secret.jpg", ""),
    "variable": ("$HOME/secret.jpg", ""),
    "glob": ("*.jpg", ""),
}


def _named_images(raw, kind, folder="train"):
    write_images(raw, kind, good_images(3), folder)
    if kind == "folder":
        (raw / folder / "folder.jpg").mkdir()


def _path_cases():
    kinds = ("folder", "tar", "tar.gz")
    for i, (name, (path, said)) in enumerate((UNSAFE | MISSING).items()):
        status = "refused" if name in UNSAFE else "missing"
        expected = Rows(3, "ok ok ok", status, said)
        kind = kinds[i % 3]

        def hpd(raw, path=path, kind=kind):
            write_json(
                raw / "train.json",
                [hpd_record(0), {**hpd_record(1), "file_path": [path, "1-right.jpg"]}, hpd_record(2)],
            )
            _named_images(raw, kind)

        def hpdv3(raw, path=path):
            write_json(raw / "train.json", [hpdv3_record(0), {**hpdv3_record(1), "path1": path}, hpdv3_record(2)])
            _named_images(raw, "folder", "images")

        def pairs(raw, path=path):
            columns = pairs_columns(3)
            columns["image_0"] = pa.array(["0-left.jpg", path, "2-left.jpg"])
            columns["image_1"] = pa.array([f"{i}-right.jpg" for i in range(3)])
            write_parquet(raw / "data" / "bad.parquet", columns)
            _named_images(raw, "folder", "data")

        case(f"hpd_path_{name}_{kind}", "hpd", expected)(hpd)
        # Its folder is the source itself, so that other names are missing than of a folder of images.
        case(f"hpdv3_path_{name}", "hpdv3", expected)(hpdv3)
        # An id may stand where a path may; an empty text is neither.
        of_pairs = Rows(3, "ok ok no_image", said="neither bytes nor uid") if name == "empty" else expected
        case(f"pairs_path_{name}", "pairs", of_pairs)(pairs)


_path_cases()


def archive_case(name, members, expected, kinds=("tar", "tar.gz"), records=None, wrap=None):
    """An HPDv2 train split whose images lie in a tar of these members (or of these bytes)."""
    for kind in kinds:

        def write(raw, kind=kind):
            content = members() if callable(members) else members
            content = content if isinstance(content, bytes) else tar_bytes(content)
            content = content if kind == "tar" else gzip.compress(content, 1)
            (raw / f"train.{kind}").write_bytes(content if wrap is None else wrap(content))
            write_json(raw / "train.json", records or [hpd_record(i) for i in range(3)])

        refused = isinstance(expected, Refused)
        case(f"hpd_archive_{name}_{kind}", "hpd", Refused(f"train.{kind}", expected.said) if refused else expected)(
            write
        )


def archived(**replaced):
    """Return the members of three records' images, 1-left.jpg replaced."""
    named = {f"train/{name}": member(f"train/{name}", data) for name, data in good_images(3).items()}
    named["train/1-left.jpg"] = replaced.get("left")
    return [m for m in named.values() if m is not None]


LEFT = "train/1-left.jpg"
archive_case(
    "symlink",
    archived(left=member(LEFT, type=tarfile.SYMTYPE, linkname="../secret.jpg")),
    Rows(3, "ok ok ok", "refused", LINK),
)
archive_case(
    "hardlink",
    archived(left=member(LEFT, type=tarfile.LNKTYPE, linkname="train/0-left.jpg")),
    Rows(3, "ok ok ok", "refused", LINK),
)
archive_case("fifo", archived(left=member(LEFT, type=tarfile.FIFOTYPE)), Rows(3, "ok ok ok", "refused", SPECIAL))
archive_case("device", archived(left=member(LEFT, type=tarfile.BLKTYPE)), Rows(3, "ok ok ok", "refused", SPECIAL))
archive_case(
    "sparse",
    archived(left=member(LEFT, jpeg(81), type=tarfile.GNUTYPE_SPARSE)),
    Rows(3, "ok ok ok", "refused", SPECIAL),
)
archive_case(
    "folder_named_like_an_image",
    archived(left=member(LEFT + "/", type=tarfile.DIRTYPE)),
    Rows(3, "ok ok ok", "missing", "no member"),
)
archive_case("without_an_image", archived(), Rows(3, "ok ok ok", "missing", "no member"))
archive_case("nothing_in_it", [], Rows(3, "ok ok ok", "missing missing missing missing missing missing", "no member"))
archive_case(
    "with_members_outside",
    [*archived(left=member(LEFT, jpeg(83))), member("../secret.jpg", jpeg(84)), member("/etc/passwd", b"x")],
    Rows(3, "ok ok ok"),
)
archive_case(
    "names_its_member_outside",
    [*archived(), member("../secret.jpg", jpeg(84))],
    Rows(3, "ok ok ok", "refused", DOTS),
    records=[hpd_record(0), hpd_record(1, "../secret.jpg"), hpd_record(2)],
)
archive_case("names_with_dot_slash", archived(left=member("./" + LEFT, jpeg(83))), Rows(3, "ok ok ok"))
archive_case(
    "two_spellings_of_a_name",
    archived(left=member(LEFT, jpeg(83))),
    Rows(4, "ok ok ok same_image"),
    records=[*(hpd_record(i) for i in range(3)), hpd_record(3, "1-left.jpg", "./1-left.jpg")],
)
archive_case("member_twice", [*archived(left=member(LEFT, jpeg(83))), member(LEFT, jpeg(84))], Rows(3, "ok ok ok"))
archive_case(
    "cut_within_an_image",
    lambda: tar_bytes(archived(left=member(LEFT, jpeg(83))))[:-4000],
    Refused("", "fetch it again"),
)
archive_case("size_beyond_the_end", [*archived(), member(LEFT, b"abc", size=50_000)], Refused("", "fetch it again"))
archive_case("size_negative", [member(LEFT, b"abc", size=-1024), *archived()], Refused("", "fetch it again"))
archive_case(
    "image_of_70_mb",
    [*archived(), member(LEFT, b"\0" * 70_000_000)],
    Rows(3, "ok ok ok", "too_large", "limits.max_image_bytes"),
)
archive_case("html", HTML * 20, Refused("", "fetch it again"))
archive_case("zero_bytes", b"", Refused("", "fetch it again"))
for share in (0.3, 0.7, 0.99):
    archive_case(
        f"compression_cut_at_{share}",
        archived(left=member(LEFT, jpeg(83))),
        Refused("", "fetch it again"),
        kinds=("tar.gz",),
        wrap=lambda content, share=share: content[: int(len(content) * share)],
    )
archive_case(
    "bad_checksum_in_the_middle",
    lambda: tar_bytes(archived(), end=False) + b"garbage!" * 64 + tar_bytes([member(LEFT, jpeg(83))]),
    Refused("", "fetch it again"),
)


@case("hpd_image_is_a_named_pipe", "hpd", Rows(3, "ok ok ok", "missing", "1-left.jpg"))
def _(raw):
    write_json(raw / "train.json", [hpd_record(i) for i in range(3)])
    write_images(raw, "folder", good_images(3))
    (raw / "train" / "1-left.jpg").unlink()
    os.mkfifo(raw / "train" / "1-left.jpg")


@case("hpd_image_is_an_endless_device", "hpd", Rows(3, "ok ok ok", "missing", "1-left.jpg"))
def _(raw):
    write_json(raw / "train.json", [hpd_record(i) for i in range(3)])
    write_images(raw, "folder", good_images(3))
    (raw / "train" / "1-left.jpg").unlink()
    (raw / "train" / "1-left.jpg").symlink_to("/dev/zero")


@case("hpd_image_is_a_broken_link", "hpd", Rows(3, "ok ok ok", "missing", "1-left.jpg"))
def _(raw):
    write_json(raw / "train.json", [hpd_record(i) for i in range(3)])
    write_images(raw, "folder", good_images(3))
    (raw / "train" / "1-left.jpg").unlink()
    (raw / "train" / "1-left.jpg").symlink_to("1-left.jpg")


@case("hpd_images_named_again_and_again", "hpd", Rows(600, " ".join(["ok"] * 600)))
def _(raw):
    write_json(raw / "train.json", [hpd_record(i, "0-left.jpg", "0-right.jpg") for i in range(600)])
    write_images(raw, "folder", good_images(1))


# --- JSON ----------------------------------------------------------------------------------------------------------


def json_case(name, layout, content, expected):
    """A train.json with this content, or with good records around the middle one."""

    def write(raw):
        made = content() if callable(content) else content
        make = {"hpd": hpd_record, "hpdv3": hpdv3_record}[layout]
        write_json(raw / "train.json", [make(0), made, make(2)] if not isinstance(made, bytes) else made)
        write_images(raw, "folder", good_images(3), {"hpd": "train", "hpdv3": "images"}[layout])

    case(f"{layout}_json_{name}", layout, expected)(write)


BAD = Rows(3, "ok ok unreadable", said="expected")
AGAIN = Refused("train.json", "fetch it again")
TWO = json.dumps([hpd_record(0), hpd_record(2)]).encode()
json_case("zero_bytes", "hpd", b"", Refused("train.json", "is empty"))
json_case("only_space", "hpd", b" \n\t ", Refused("train.json", "is empty"))
json_case("only_a_byte_order_mark", "hpd", b"\xef\xbb\xbf", Refused("train.json", "is empty"))
json_case("empty_list", "hpd", b"[]", Rows(0, ""))
json_case("empty_object", "hpd", b"{}", Rows(1, "unreadable", said="expected a field"))
json_case("null", "hpd", b"null", Refused("train.json", "not a JSON list of records"))
json_case("html", "hpd", HTML, Refused("train.json", "not a JSON list of records"))
json_case(
    "list_of_other_things",
    "hpd",
    b'[1, null, "text", [], true]',
    Rows(5, " ".join(["unreadable"] * 5), said="expected an object"),
)
json_case("cut_in_a_record", "hpd", TWO[: len(TWO) * 2 // 3], AGAIN)
json_case("cut_in_a_text", "hpd", TWO[:30], AGAIN)
json_case("cut_between_records", "hpd", TWO[:-1], AGAIN)
json_case("cut_in_a_utf8_character", "hpd", '[{"prompt": "\u00e9'.encode()[:-1], AGAIN)
json_case("record_after_the_list", "hpd", TWO + TWO, Refused("train.json", "behind the closing bracket"))
json_case("garbage_after_the_list", "hpd", TWO + b"garbage", Refused("train.json", "behind the closing bracket"))
json_case("space_after_the_list", "hpd", TWO + b" \n\0"[:2] * 50, Rows(2, "ok ok"))
json_case("byte_order_mark", "hpd", b"\xef\xbb\xbf" + TWO, Rows(2, "ok ok"))
json_case("utf_16", "hpd", TWO.decode().encode("utf-16"), Refused("train.json", "not a JSON list of records"))
json_case(
    "one_record_per_line", "hpd", b"\n".join(json.dumps(hpd_record(i)).encode() for i in (0, 2)), Rows(2, "ok ok")
)
json_case("line_cut", "hpd", b"\n".join(json.dumps(hpd_record(i)).encode() for i in (0, 2))[:-9], AGAIN)
json_case("nested_100000_deep", "hpd", b"[" + b"[" * 100_000 + b"]" * 100_001, Refused("train.json", "record 0"))
json_case("integer_of_10000_digits", "hpd", b'[{"prompt": ' + b"9" * 10_000 + b"}]", Refused("train.json", "record 0"))
json_case(
    "not_utf8",
    "hpd",
    TWO.replace(b"a prompt", b"caf\xe9 \xff\xfe", 1),
    Rows(2, "ok unreadable", said="not valid UTF-8"),
)
json_case(
    "overlong_utf8", "hpd", TWO.replace(b"a prompt", b"\xc0\xaf", 1), Rows(2, "ok unreadable", said="not valid UTF-8")
)
json_case("keys_twice", "hpd", TWO.replace(b'{"prompt"', b'{"prompt": 1, "prompt"', 1), Rows(2, "ok ok"))
json_case("control_characters", "hpd", TWO.replace(b"a prompt", b"a\x00\x01\x1b[2J", 1), Rows(2, "ok ok"))
json_case(
    "lone_surrogate", "hpd", TWO.replace(b"a prompt", b"\\ud800", 1), Rows(2, "ok unreadable", said="not valid UTF-8")
)
json_case(
    "lone_surrogate_in_a_path",
    "hpd",
    lambda: hpd_record(1, "\ud800.jpg"),
    Rows(3, "ok ok unreadable", said="not valid UTF-8"),
)
json_case("lone_surrogate_in_a_key", "hpd", lambda: {"\ud800": 1}, BAD)
json_case(
    "prompt_of_100000_characters",
    "hpd",
    lambda: hpd_record(1, prompt="word \u00e9\U0001f600 " * 12_500),
    Rows(3, "ok ok ok"),
)
json_case("prompt_null", "hpd", lambda: hpd_record(1, prompt=None), Rows(3, "ok ok no_prompt", said="null"))
json_case("prompt_a_number", "hpd", lambda: hpd_record(1, prompt=5), BAD)
json_case("prompt_a_list", "hpd", lambda: hpd_record(1, prompt=["a"]), BAD)
json_case("prompt_empty", "hpd", lambda: hpd_record(1, prompt=""), Rows(3, "ok ok ok"))
json_case(
    "prompt_right_to_left",
    "hpd",
    lambda: hpd_record(1, prompt="\u202e\u0645\u0631\u062d\u0628\u0627 \U0001f468\u200d\U0001f469\u200d\U0001f467"),
    Rows(3, "ok ok ok"),
)
for name, value in {
    "null": None,
    "number": 7,
    "text": "1-left.jpg",
    "one": ["1-left.jpg"],
    "three": ["a", "b", "c"],
    "of_null": [None, "b"],
    "of_numbers": [1, 2],
    "of_lists": [["a"], ["b"]],
    "object": {"a": 1},
}.items():
    json_case(f"file_path_{name}", "hpd", lambda value=value: {**hpd_record(1), "file_path": value}, BAD)
json_case(
    "file_path_the_same_twice",
    "hpd",
    lambda: hpd_record(1, "1-left.jpg", "1-left.jpg"),
    Rows(3, "ok ok same_image", said="same bytes"),
)
for name, value, status in (
    ("nan", [float("nan"), 0], "unreadable"),
    ("infinity", [float("inf"), 0], "unreadable"),
    ("of_400_digits", [10**400, 0], "unreadable"),
    ("of_true", [True, False], "unreadable"),
    ("of_text", ["1", "0"], "unreadable"),
    ("three", [1, 0, 0], "unreadable"),
    ("text", "left", "unreadable"),
    ("both", [1, 1], "invalid_label"),
    ("negative", [-1, 2], "invalid_label"),
    ("null", None, "unlabelled"),
):
    json_case(
        f"label_{name}",
        "hpd",
        lambda value=value: hpd_record(1, human_preference=value),
        Rows(3, f"ok ok {status}", said="expected" if status != "unlabelled" else "no label"),
    )
json_case("label_of_1e999", "hpd", TWO.replace(b"[1, 0]", b"[1e999, 0]", 1), Rows(2, "ok unreadable", said="expected"))
for name, fields in {
    "counts_nan": {"choice_dist": [float("nan"), 1]},
    "counts_negative": {"choice_dist": [-1, 1]},
    "counts_of_400_digits": {"choice_dist": [10**400, 1]},
    "counts_of_19_digits": {"choice_dist": [10**19, 1]},
    "counts_halves": {"choice_dist": [1.5, 1]},
    "counts_of_text": {"choice_dist": ["3", "1"]},
    "counts_three": {"choice_dist": [1, 1, 1]},
    "counts_object": {"choice_dist": {"0": 1}},
    "confidence_nan": {"confidence": float("nan")},
    "confidence_of_400_digits": {"confidence": 10**400},
    "confidence_text": {"confidence": "high"},
    "model_a_number": {"model1": 5},
    "model_with_lone_surrogate": {"model1": "\ud800"},
    "path_null": {"path1": None},
    "path_a_number": {"path2": 5},
    "path_a_list": {"path2": ["a.jpg"]},
}.items():
    json_case(name, "hpdv3", lambda fields=fields: hpdv3_record(1, **fields), BAD)
json_case(
    "counts_zero", "hpdv3", lambda: hpdv3_record(1, choice_dist=[0, 0]), Rows(3, "ok ok unlabelled", said="no label")
)
json_case("counts_null", "hpdv3", lambda: hpdv3_record(1, choice_dist=None), Rows(3, "ok ok ok"))
json_case(
    "counts_of_18_digits",
    "hpdv3",
    lambda: hpdv3_record(1, choice_dist=[4 * 10**18, 4 * 10**18]),
    Rows(3, "ok ok invalid_label invalid_label", said="count"),
)
json_case(
    "unknown_fields_deep",
    "hpdv3",
    lambda: hpdv3_record(1, more=functools.reduce(lambda value, _: [value], range(300), 0)),
    Rows(3, "ok ok ok"),
)


def group_case(name, group, expected):
    """A test.json of one good group and this one."""

    def write(raw):
        names = list(good_images(2))
        write_json(raw / "test.json", [hpd_group(0, names[:2]), group()])
        write_images(raw, "folder", good_images(2), "test")

    case(f"hpd_group_{name}", "hpd", expected)(write)


FILES = ["1-left.jpg", "1-right.jpg"]
for name, fields in {
    "no_raters": {"raw_annotations": []},
    "raters_null": {"raw_annotations": None},
    "rater_a_number": {"raw_annotations": [1]},
    "rank_null": {"raw_annotations": [{"rank": None}]},
    "rank_short": {"raw_annotations": [{"rank": [1]}]},
    "rank_nan": {"raw_annotations": [{"rank": [float("nan"), 1]}]},
    "rank_of_400_digits": {"raw_annotations": [{"rank": [10**400, 1]}]},
    "rank_of_text": {"raw_annotations": [{"rank": ["1", "2"]}]},
    "one_image": {"image_path": ["1-left.jpg"]},
    "images_null": {"image_path": None},
    "image_null": {"image_path": [None, "1-left.jpg"]},
}.items():
    group_case(
        name, lambda fields=fields: {**hpd_group(1, FILES), **fields}, Rows(2, "ok ok unreadable", said="expected")
    )
group_case(
    "person_with_lone_surrogate",
    lambda: {**hpd_group(1, FILES), "raw_annotations": [{"rank": [1, 2], "user_hash": "\ud800"}]},
    Rows(2, "ok ok unreadable", said="UTF-8"),
)
group_case(
    "person_a_list",
    lambda: {**hpd_group(1, FILES), "raw_annotations": [{"rank": [1, 2], "user_hash": ["\ud800"]}]},
    Rows(2, "ok ok ok"),
)
group_case(
    "image_twice",
    lambda: hpd_group(1, ["1-left.jpg", "1-left.jpg"]),
    Rows(2, "ok ok same_image same_image", said="same bytes"),
)
group_case(
    "path_outside", lambda: hpd_group(1, ["1-left.jpg", "../secret.jpg"]), Rows(2, "ok ok ok ok", "refused", DOTS)
)
group_case(
    "of_2000_images",
    lambda: hpd_group(1, [f"{i}.jpg" for i in range(2000)]),
    Rows(2, "ok ok unreadable", said="at most"),
)


# --- parquet -------------------------------------------------------------------------------------------------------


def parquet_case(name, layout, edit, expected, **options):
    """Three rows of the layout, edited; beside a good file if they are refused."""
    is_refused = isinstance(expected, Refused)

    def write(raw):
        columns = COLUMNS[layout](3)
        edit(columns)
        write_parquet(raw / "bad.parquet", columns, **options)
        if is_refused:
            write_parquet(raw / "good.parquet", COLUMNS[layout](2, 50))

    case(f"{layout}_parquet_{name}", layout, expected, has_sibling=is_refused)(write)


def file_case(name, damage, expected, layout="pickapic", **options):
    """A good file of 24 rows in three row groups whose bytes are damaged."""

    def write(raw):
        write_parquet(raw / "bad.parquet", COLUMNS[layout](24), row_group_size=8, **options)
        (raw / "bad.parquet").write_bytes(damage((raw / "bad.parquet").read_bytes()))
        write_parquet(raw / "good.parquet", COLUMNS[layout](2, 50))

    case(f"{layout}_file_{name}", layout, expected, has_sibling=True)(write)


def put(column, value, kind=None):
    """Return an edit that puts a value into the middle row."""

    def edit(columns):
        values = columns[column].to_pylist()
        values[1] = value
        columns[column] = pa.array(values, kind or columns[column].type)

    return edit


def whole(column, values):
    """Return an edit that replaces a column."""

    def edit(columns):
        columns[column] = values() if callable(values) else values

    return edit


def cast(column, kind):
    def edit(columns):
        columns[column] = columns[column].cast(kind)

    return edit


def drop(column):
    def edit(columns):
        del columns[column]

    return edit


def unchecked(values, kind=None):
    """Return a text column of bytes that are not checked to be UTF-8."""
    kind = kind or pa.string()
    array = pa.array(values, pa.large_binary() if kind == pa.large_string() else pa.binary())
    return pa.Array.from_buffers(kind, len(array), array.buffers())


def unchecked_view(values):
    array = pa.array(values, pa.binary_view())
    return pa.Array.from_buffers(pa.string_view(), len(array), array.buffers())


def damaged_page(data):
    """Return a parquet file whose last row group's first page has another header."""
    facts = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(2).column(0)
    at = facts.dictionary_page_offset or facts.data_page_offset
    return data[:at] + b"\xff" * 32 + data[at + 32 :]


UNREADABLE = Refused("bad.parquet", "not a readable parquet file")
WRONG_TYPE = Refused("bad.parquet", "expected")
GOOD = Rows(3, "ok ok ok")
for word, damage in {
    "zero_bytes": lambda data: b"",
    "four_bytes": lambda data: data[:4],
    "cut_in_half": lambda data: data[: len(data) // 2],
    "cut_before_the_end": lambda data: data[:-1],
    "html": lambda data: HTML,
    "zeros": lambda data: bytes(len(data)),
    "footer_only": lambda data: data[-8:],
    "footer_garbled": lambda data: data[:-200] + b"\xff" * 100 + data[-100:],
    "footer_of_4_gb": lambda data: data[:-8] + b"\xff\xff\xff\xff" + data[-4:],
    "last_row_group_garbled": damaged_page,
    "encrypted": lambda data: data[:-4] + b"PARE",
}.items():
    file_case(word, damage, UNREADABLE)
file_case("arrow_file", lambda data: _arrow_file(), UNREADABLE)
file_case("bytes_behind", lambda data: data + b"garbage", UNREADABLE)


def _arrow_file():
    sink = pa.BufferOutputStream()
    columns = pickapic_columns(2)
    table = pa.Table.from_arrays(list(columns.values()), list(columns))
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def no_rows(columns):
    for name, values in columns.items():
        columns[name] = values[:0]


parquet_case("no_rows", "pickapic", no_rows, Rows(0, ""))
parquet_case("no_rows", "pairs", no_rows, Rows(0, ""))
parquet_case("no_rows", "rapidata", no_rows, Rows(0, ""))
parquet_case("column_missing", "pickapic", drop("caption"), Refused("bad.parquet", "column 'caption' is missing"))
parquet_case("column_missing", "pairs", drop("image_1"), Refused("bad.parquet", "column 'image_1' is missing"))
parquet_case(
    "column_missing", "rapidata", drop("votes_image2"), Refused("bad.parquet", "column 'votes_image2' is missing")
)
parquet_case(
    "no_image_columns",
    "pickapic",
    lambda c: (c.pop("jpg_0"), c.pop("jpg_1")),
    Rows(3, "ok ok ok", " ".join(["no_bytes"] * 6), "no bytes"),
)
for word, values in {
    "struct": pa.array([{"text": "a"}] * 3),
    "list": pa.array([["a"]] * 3),
    "map": pa.array([[("a", 1)]] * 3, pa.map_(pa.string(), pa.int64())),
    "binary": pa.array([b"a"] * 3),
    "large_binary": pa.array([b"a"] * 3, pa.large_binary()),
    "fixed_binary": pa.array([b"\xff"] * 3, pa.binary(1)),
    "binary_view": pa.array([b"\xff"] * 3, pa.binary_view()),
    "uuid": pa.array([b"\xff" * 16] * 3, pa.uuid()),
}.items():
    parquet_case(f"caption_{word}", "pickapic", whole("caption", values), WRONG_TYPE)
parquet_case("caption_large_string", "pickapic", cast("caption", pa.large_string()), GOOD)
parquet_case("caption_string_view", "pickapic", cast("caption", pa.string_view()), GOOD)
parquet_case(
    "caption_string_view_not_utf8",
    "pickapic",
    whole("caption", lambda: unchecked_view(NOT_UTF8)),
    Rows(3, "ok ok unreadable", said="not valid UTF-8"),
)
parquet_case("caption_dictionary", "pickapic", lambda c: c.update(caption=c["caption"].dictionary_encode()), GOOD)
parquet_case(
    "caption_dictionary_of_bytes", "pickapic", whole("caption", pa.array([b"\xff"] * 3).dictionary_encode()), WRONG_TYPE
)
parquet_case("caption_numbers", "pickapic", whole("caption", pa.array([1, 2, 3])), GOOD)
parquet_case(
    "caption_nulls_only",
    "pickapic",
    whole("caption", pa.nulls(3)),
    Rows(3, "no_prompt no_prompt no_prompt", said="null"),
)
parquet_case("caption_null", "pickapic", put("caption", None), Rows(3, "ok ok no_prompt", said="null"))
parquet_case("caption_empty", "pickapic", put("caption", ""), GOOD)
parquet_case("caption_of_100000_characters", "pickapic", put("caption", "word " * 20_000), GOOD)
parquet_case("caption_with_nul", "pickapic", put("caption", "a\0b\x07\x1b[2J\r\n\u2028"), GOOD)
parquet_case("caption_right_to_left", "pickapic", put("caption", "\u202eabc \U0001f600\u200d\ufeff"), GOOD)
parquet_case("caption_decomposed", "pickapic", put("caption", "e\u0301" * 1000), GOOD)
NOT_UTF8 = [b"a prompt", b"caf\xe9 \xff", b"other"]
parquet_case(
    "caption_not_utf8",
    "pickapic",
    whole("caption", lambda: unchecked(NOT_UTF8)),
    Rows(3, "ok ok unreadable", said="not valid UTF-8"),
)
parquet_case(
    "caption_large_not_utf8",
    "pickapic",
    whole("caption", lambda: unchecked(NOT_UTF8, pa.large_string())),
    Rows(3, "ok ok unreadable", said="not valid UTF-8"),
)
parquet_case(
    "caption_dictionary_not_utf8",
    "pickapic",
    whole("caption", lambda: unchecked(NOT_UTF8).dictionary_encode()),
    Rows(3, "ok ok unreadable", said="not valid UTF-8"),
)
parquet_case(
    "caption_surrogates_in_utf8",
    "pickapic",
    whole("caption", lambda: unchecked([b"a", b"\xed\xa0\x80", b"b"])),
    Rows(3, "ok ok unreadable", said="not valid UTF-8"),
)
parquet_case(
    "model_not_utf8",
    "pickapic",
    whole("model_0", lambda: unchecked(NOT_UTF8)),
    Rows(3, "ok ok unreadable", said="not valid UTF-8"),
)
parquet_case("uid_not_utf8", "pickapic", whole("image_0_uid", lambda: unchecked(NOT_UTF8)), GOOD)
parquet_case(
    "uids_not_utf8_without_bytes",
    "pickapic",
    lambda c: c.update(
        image_0_uid=unchecked([b"\xff", b"\xfe", b"c"]),
        image_1_uid=unchecked([b"\xfd", b"\xfc", b"d"]),
        jpg_0=pa.nulls(3, pa.binary()),
        jpg_1=pa.nulls(3, pa.binary()),
    ),
    Rows(3, "ok ok ok", " ".join(["no_bytes"] * 6), "no bytes"),
)
parquet_case("uids_with_nul", "pickapic", put("image_0_uid", "a\0b"), GOOD)
parquet_case("uids_numbers", "pickapic", whole("image_0_uid", pa.array([1, 2, 3])), GOOD)
parquet_case("uids_struct", "pickapic", whole("image_0_uid", pa.array([{"a": 1}] * 3)), WRONG_TYPE)
parquet_case("image_null", "pickapic", put("jpg_0", None), Rows(3, "ok ok ok", "no_bytes", "no bytes"))
parquet_case(
    "image_and_uid_null",
    "pickapic",
    lambda c: (put("jpg_0", None)(c), put("image_0_uid", None)(c)),
    Rows(3, "ok ok no_image", said="neither bytes nor uid"),
)
parquet_case(
    "images_all_null",
    "pickapic",
    whole("jpg_0", pa.nulls(3)),
    Rows(3, "ok ok ok", "no_bytes no_bytes no_bytes", "no bytes"),
)
parquet_case(
    "images_equal",
    "pickapic",
    lambda c: c.update(jpg_1=c["jpg_0"]),
    Rows(3, "same_image same_image same_image", said="same bytes"),
)
parquet_case("images_large_binary", "pickapic", cast("jpg_0", pa.large_binary()), GOOD)
parquet_case("images_binary_view", "pickapic", cast("jpg_0", pa.binary_view()), GOOD)
parquet_case("images_dictionary", "pickapic", lambda c: c.update(jpg_0=c["jpg_0"].dictionary_encode()), GOOD)
parquet_case("images_fixed_binary", "pickapic", whole("jpg_0", pa.array([b"\xff\xd8"] * 3, pa.binary(2))), WRONG_TYPE)
parquet_case("images_lists_of_numbers", "pickapic", whole("jpg_0", pa.array([[255, 216]] * 3)), WRONG_TYPE)
parquet_case("images_floats", "pickapic", whole("jpg_0", pa.array([0.5] * 3)), WRONG_TYPE)
parquet_case(
    "images_no_base64",
    "pickapic",
    whole("jpg_0", pa.array(["%%%", "data:image/png;base64,AAAA", "A"])),
    Rows(3, "ok ok ok", "unreadable unreadable unreadable", "base64"),
)
parquet_case(
    "images_text_not_utf8",
    "pickapic",
    whole("jpg_0", lambda: unchecked([b"\xff", b"\xfe", b"AAAA"])),
    Rows(3, "ok ok ok", "unreadable unreadable unreadable", "base64"),
)
parquet_case(
    "images_numbers",
    "pickapic",
    whole("jpg_0", pa.array([1, 2, 3])),
    Rows(3, "ok ok ok", "unreadable unreadable unreadable", "base64"),
)
parquet_case(
    "label_nan", "pickapic", put("label_0", float("nan")), Rows(3, "ok ok invalid_label", said="expected 1 / 0")
)
parquet_case(
    "label_infinite", "pickapic", put("label_0", float("inf")), Rows(3, "ok ok invalid_label", said="expected 1 / 0")
)
parquet_case("label_negative", "pickapic", put("label_0", -1.0), Rows(3, "ok ok invalid_label", said="expected 1 / 0"))
parquet_case("label_null", "pickapic", put("label_0", None), Rows(3, "ok ok invalid_label", said="expected 1 / 0"))
parquet_case("label_integers", "pickapic", cast("label_0", pa.int64()), GOOD)
parquet_case("label_small_floats", "pickapic", cast("label_0", pa.float16()), GOOD)
parquet_case("label_decimals", "pickapic", cast("label_0", pa.decimal128(5, 2)), GOOD)
parquet_case("label_long_decimals", "pickapic", cast("label_0", pa.decimal256(60, 2)), WRONG_TYPE)
parquet_case("label_booleans", "pickapic", cast("label_0", pa.bool_()), GOOD)
parquet_case(
    "label_texts",
    "pickapic",
    whole("label_0", pa.array(["0.0", "yes", "0"])),
    Rows(3, "ok ok unreadable", said="expected a number, found 'yes'"),
)
parquet_case("label_times", "pickapic", cast("created_at", pa.timestamp("us")), GOOD)
parquet_case("label_is_a_time", "pickapic", lambda c: c.update(label_0=c["created_at"]), WRONG_TYPE)
parquet_case("label_list", "pickapic", whole("label_0", pa.array([[1.0]] * 3)), WRONG_TYPE)
parquet_case(
    "has_label_numbers",
    "pickapic",
    whole("has_label", pa.array([1, 0, 1])),
    Rows(3, "ok ok unlabelled", said="no label"),
)
parquet_case(
    "has_label_text",
    "pickapic",
    whole("has_label", pa.array(["True", "maybe", "1"])),
    Rows(3, "ok ok unreadable", said="true or false"),
)
parquet_case(
    "time_with_zone",
    "pickapic",
    whole("created_at", pa.array([datetime(2023, 1, 1)] * 3, pa.timestamp("us", "Asia/Tokyo"))),
    GOOD,
)
parquet_case(
    "time_with_offset",
    "pickapic",
    whole("created_at", pa.array([datetime(2023, 1, 1)] * 3, pa.timestamp("us", "+09:00"))),
    GOOD,
)
parquet_case(
    "time_with_unknown_zone",
    "pickapic",
    whole("created_at", pa.array([1, 2, 3], pa.timestamp("us", "Mars/Olympus"))),
    WRONG_TYPE,
)
parquet_case("time_in_seconds", "pickapic", cast("created_at", pa.timestamp("s")), GOOD)
parquet_case("time_far_away", "pickapic", whole("created_at", pa.array([2**62, -(2**62), 0], pa.timestamp("us"))), GOOD)
parquet_case("time_dates", "pickapic", cast("created_at", pa.date32()), GOOD)
parquet_case("time_numbers", "pickapic", whole("created_at", pa.array([1, 2, 3])), WRONG_TYPE)
parquet_case("time_of_day", "pickapic", whole("created_at", pa.array([1, 2, 3], pa.time64("us"))), WRONG_TYPE)
parquet_case("time_durations", "pickapic", whole("created_at", pa.array([1, 2, 3], pa.duration("us"))), WRONG_TYPE)
parquet_case(
    "time_text",
    "pickapic",
    whole("created_at", pa.array(["2023-01-01", "yesterday", "None"])),
    Rows(3, "ok ok unreadable", said="expected a time"),
)
parquet_case("user_floats", "pickapic", whole("user_id", pa.array([1.0, 2.0, None])), GOOD)
parquet_case("user_floats_1e300", "pickapic", whole("user_id", pa.array([1e300, 2.0, None])), Rows(3, "ok ok ok"))
parquet_case(
    "compressed_1000_times",
    "pickapic",
    whole("caption", pa.array(["a" * 1_000_000, "b" * 1_000_000, "c"])),
    GOOD,
    compression="zstd",
)
parquet_case(
    "more_columns",
    "pickapic",
    lambda c: c.update({"": pa.nulls(3), "\0": pa.array([[1]] * 3), "extra" * 999: pa.array([1, 2, 3])}),
    GOOD,
)
parquet_case("label_nan", "pairs", put("label_0", float("nan")), Rows(3, "ok ok invalid_label", said="expected 1 / 0"))
parquet_case("label_0.7", "pairs", put("label_0", 0.7), Rows(3, "ok ok invalid_label", said="expected 1 / 0"))
parquet_case(
    "split_unknown",
    "pairs",
    whole("split", pa.array(["train", "holdout\0", None])),
    Rows(3, "ok ok unreadable", said="column 'split'"),
)
parquet_case(
    "count_zero", "pairs", whole("count", pa.array([1, 0, -5])), Rows(3, "ok invalid_label invalid_label", said="count")
)
parquet_case("count_nan", "pairs", whole("count", pa.array([1.0, float("nan"), 2.0])), GOOD)
parquet_case(
    "count_of_19_digits",
    "pairs",
    whole("count", pa.array([1, 2**63 - 1, 2**63 - 1])),
    Rows(3, "ok invalid_label invalid_label", said="count"),
)
parquet_case(
    "count_of_20_digits",
    "pairs",
    whole("count", pa.array([1, 2**64 - 1, 1], pa.uint64())),
    Rows(3, "ok ok unreadable", said="count"),
)
parquet_case(
    "image_struct_path_not_utf8",
    "pairs",
    whole(
        "image_0",
        lambda: pa.StructArray.from_arrays(
            [pa.array([jpeg(1), jpeg(2), None]), unchecked(NOT_UTF8)], ["bytes", "path"]
        ),
    ),
    Rows(3, "ok ok ok", "no_bytes"),
)
parquet_case(
    "image_struct_path_bytes",
    "pairs",
    whole(
        "image_0",
        lambda: pa.StructArray.from_arrays(
            [pa.array([jpeg(1), jpeg(2), None]), pa.array([b"\xff", b"a", b"b"])], ["bytes", "path"]
        ),
    ),
    WRONG_TYPE,
)
parquet_case(
    "image_struct_path_list",
    "pairs",
    whole("image_0", lambda: pa.array([{"bytes": jpeg(i), "path": ["a"]} for i in range(3)])),
    WRONG_TYPE,
)
parquet_case(
    "image_struct_null",
    "pairs",
    whole("image_0", lambda: pa.array([{"bytes": jpeg(1), "path": "a"}, None, {"bytes": None, "path": None}])),
    Rows(3, "ok no_image no_image", said="neither bytes nor uid"),
)
parquet_case("image_struct_of_other_fields", "pairs", whole("image_0", pa.array([{"data": b"a"}] * 3)), WRONG_TYPE)
parquet_case(
    "image_struct_with_path_outside",
    "pairs",
    whole("image_0", lambda: pa.array([{"bytes": None, "path": "../secret.jpg"}] * 3)),
    Rows(3, "ok ok ok", "refused", "'..'"),
)
parquet_case(
    "image_paths_not_utf8",
    "pairs",
    whole("image_0", lambda: unchecked(NOT_UTF8)),
    Rows(3, "ok ok ok", "missing missing missing"),
)
parquet_case(
    "image_paths_dictionary",
    "pairs",
    whole("image_0", pa.array(["../secret.jpg"] * 3).dictionary_encode()),
    Rows(3, "ok ok ok", "refused", DOTS),
)
for word, votes, status in (
    ("nan", [2.0, float("nan"), 1.0], "unreadable"),
    ("infinite", [2.0, float("inf"), 1.0], "unreadable"),
    ("negative", [2.0, -1.0, 1.0], "unreadable"),
    ("1e300", [2.0, 1e300, 1.0], "unreadable"),
    ("9e18", [2.0, 9e18, 1.0], "unreadable"),
    ("halves", [2.0, 0.5, 1.0], "unlabelled"),
    ("null", [2.0, None, 1.0], "unlabelled"),
):
    parquet_case(
        f"votes_{word}",
        "rapidata",
        whole("votes_image1", pa.array(votes)),
        Rows(3, f"ok ok {status}", said="expected counts" if status == "unreadable" else "no label"),
    )
for word, text in {
    "html": HTML.decode(),
    "deep": "[" * 100_000,
    "long_integer": "[" + "9" * 10_000 + "]",
    "of_other_things": "[1, null]",
    "surrogates": '[{"votedFor": "image1", "userId": "\\ud800"}, {"votedFor": "image1"}, {"votedFor": "image1"}]',
    "person_deep": '[{"votedFor": "image1", "userId": '
    + "[" * 900
    + "]" * 900
    + '}, {"votedFor": "image1"}, {"votedFor": "image1"}]',
}.items():
    parquet_case(
        f"details_{word}",
        "rapidata",
        put("detailed_results", text),
        Rows(3, "ok ok ok ok ok" if word in ("surrogates", "person_deep") else "ok ok ok"),
    )
parquet_case(
    "image_struct_path_not_utf8",
    "rapidata",
    whole(
        "image1",
        lambda: pa.StructArray.from_arrays(
            [pa.array([jpeg(1), jpeg(2), None]), unchecked(NOT_UTF8)], ["bytes", "path"]
        ),
    ),
    Rows(3, "ok ok ok", "no_bytes"),
)


@case("pickapic_parquet_column_twice", "pickapic", Refused("bad.parquet", "caption"), has_sibling=True)
def _(raw):
    columns = pickapic_columns(3)
    table = pa.Table.from_arrays([*columns.values(), columns["caption"]], [*columns, "caption"])
    pq.write_table(table, raw / "bad.parquet")
    write_parquet(raw / "good.parquet", pickapic_columns(2, 50))


@case("pickapic_parquet_row_group_of_3000_rows", "pickapic", Rows(3000, " ".join(["ok"] * 3000)))
def _(raw):
    columns = pickapic_columns(1)
    repeated = {name: pa.concat_arrays([values] * 3000) for name, values in columns.items()}
    repeated["user_id"] = pa.array(range(3000))
    write_parquet(raw / "big.parquet", repeated, row_group_size=3000)


@case("pickapic_file_name_not_utf8", "pickapic", Refused("bad", "UTF-8"))
def _(raw):
    write_parquet(raw / "x.parquet", pickapic_columns(2))
    (raw / "x.parquet").rename(os.fsdecode(bytes(raw) + b"/bad\xff.parquet"))


@case("pickapic_file_name_strange", "pickapic", Rows(2, "ok ok"))
def _(raw):
    write_parquet(raw / "a [*] {b} ?'\"\n%41#:7 \u202e.parquet", pickapic_columns(2))


@case("pickapic_file_is_a_folder", "pickapic", Rows(2, "ok ok"))
def _(raw):
    (raw / "bad.parquet").mkdir()
    write_parquet(raw / "good.parquet", pickapic_columns(2))


@case("pickapic_folder_linked_into_itself", "pickapic", Refused("raw", "no parquet file"))
def _(raw):
    (raw / "data").symlink_to(raw / "data")


@case("pickapic_no_file", "pickapic", Refused("raw", "no parquet file"))
def _(raw):
    (raw / "readme.txt").write_text("nothing")


@case("hpd_file_is_a_folder", "hpd", Refused("train.json", "not a readable JSON file"))
def _(raw):
    (raw / "train.json").mkdir()


# --- what must hold for every case ---------------------------------------------------------------------------------


class Hangs(BaseException):
    """No Exception: nothing in the pipeline may take it for a damaged file."""


@contextlib.contextmanager
def no_longer_than(seconds):
    def stop(signum, frame):
        raise Hangs

    before = signal.signal(signal.SIGALRM, stop)
    # Again and again: what is interrupted may wait for its thread.
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.5)
    try:
        yield
    except Hangs:
        pytest.fail(f"took longer than {seconds} s")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def tree(folder):
    """Return what stands below a folder: paths, kinds and contents."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        is_plain = path.is_file() and not path.is_symlink()
        found[os.fsencode(path)] = hashlib.sha256(path.read_bytes()).hexdigest() if is_plain else path.lstat().st_mode
    return found


@dataclass(frozen=True)
class Outcome:
    source: SourceConfig
    keys: list[str]
    """Of the shards that were ingested."""
    refused: dict[str, Exception]
    """By the shard's key; '' for the listing of the source."""
    is_unchanged: bool
    """Nothing but the store was written to."""


class Corpus:
    """One store into which cases are ingested, each once, under a source of its own."""

    def __init__(self, folder):
        self.folder, self.store = folder, Store(str(folder / "store"))
        self._outcomes: dict[str, Outcome] = {}
        self._numbers = itertools.count()

    def outcome(self, hostile):
        if hostile.name not in self._outcomes:
            self._outcomes[hostile.name] = self._ingest(hostile)
        return self._outcomes[hostile.name]

    def _ingest(self, hostile):
        number = next(self._numbers)
        home = self.folder / f"case{number}"
        raw = home / "raw"
        raw.mkdir(parents=True)
        hostile.write(raw)
        for place in (home, raw):
            (place / "secret.jpg").write_bytes(SECRET)
        source = SourceConfig(name=f"c{number}", layout=hostile.layout, location=str(raw))
        before, around = tree(home), set(os.listdir(self.folder)) | {"store"}
        keys, refused = self.ingest(source, hostile.limits)
        is_unchanged = tree(home) == before and set(os.listdir(self.folder)) <= around
        return Outcome(source, keys, refused, is_unchanged)

    def ingest(self, source, limits, storage="copy"):
        """Return the keys of the shards that were ingested, and the errors of the others."""
        keys, refused = [], {}
        with no_longer_than(SECONDS_PER_CASE):
            try:
                shards = ingest.list_source(source)
            except SourceError as error:
                return [], {"": error}
            plan = ingest.plan(source.model_copy(update={"storage": storage}), shards, limits=limits)
            for shard in shards:
                try:
                    ingest.ingest_shard(self.store, plan, shard)
                    keys.append(shard.key)
                except SourceError as error:
                    refused[shard.key] = error
        return keys, refused


@pytest.fixture(autouse=True)
def _is_not_about_power_cuts(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return Corpus(tmp_path_factory.mktemp("hostile"))


def read(store, table, keys):
    return store.scan(table, partitions=keys).collect()


@pytest.mark.parametrize("hostile", CASES, ids=lambda c: c.name)
def test_a_hostile_file_is_refused_by_name_or_accounted_for_row_by_row(hostile, corpus):
    outcome, expected, store = corpus.outcome(hostile), hostile.expected, corpus.store
    assert outcome.is_unchanged, "nothing is written outside the store"
    if isinstance(expected, Refused):
        (error,) = outcome.refused.values()
        assert expected.file in str(error)
        assert expected.said in str(error)
        assert len(str(error)) < 5000
        for table in ingest.TABLES:
            committed = {m.partition for m in store.manifests(table.name, f"{outcome.source.name}.")}
            assert committed == set(outcome.keys), "of a refused shard nothing becomes visible"
        assert len(read(store, schemas.VOTES, outcome.keys)) == 2 * hostile.has_sibling, "the good shard is ingested"
        return

    assert not outcome.refused
    votes, held = read(store, schemas.VOTES, outcome.keys), read(store, schemas.IMAGES, outcome.keys)
    rows_in = sum(store.require("votes", key).extra["rows_in"] for key in outcome.keys)
    assert rows_in == expected.rows == votes["source_row"].n_unique(), "every row in is a row out"
    assert Counter(votes["status"]) == Counter(expected.votes.split())
    assert Counter(held["status"]) - Counter(ok=len(held)) == Counter(expected.images.split())
    for frame in (votes, held):
        assert (frame.filter(pl.col("status") != "ok")["reason"].str.len_chars() > 0).all()
    if expected.said:
        reasons = [*votes["reason"].drop_nulls(), *held["reason"].drop_nulls()]
        assert any(expected.said in reason for reason in reasons), reasons
    named = set(votes["image_0_id"].drop_nulls()) | set(votes["image_1_id"].drop_nulls())
    assert named <= set(held["image_id"])
    nameless = votes.filter(pl.col("image_0_id").is_null() | pl.col("image_1_id").is_null())
    assert set(nameless["status"]) <= {"no_image", "unreadable", "no_prompt"}
    assert hashlib.sha256(SECRET).hexdigest() not in set(held["sha256"])
    assert not any(SECRET in Path(store.data_path("images", key)).read_bytes() for key in outcome.keys)


def test_there_are_enough_cases_of_every_layout():
    assert len({c.name for c in CASES}) == len(CASES) >= 300
    assert set(Counter(c.layout for c in CASES)) == set(ingest.LAYOUTS)
    assert min(Counter(c.layout for c in CASES).values()) >= 15


def test_ingesting_again_reuses_all_that_was_ingested(corpus):
    for hostile in CASES:
        outcome = corpus.outcome(hostile)
        if not outcome.keys:
            continue
        shards = ingest.list_source(outcome.source)
        plan = ingest.plan(outcome.source.model_copy(update={"storage": "copy"}), shards, limits=hostile.limits)
        for shard in shards:
            if shard.key in outcome.keys:
                built = ingest.ingest_shard(corpus.store, plan, shard)
                assert {b.is_reused for b in built.values()} == {True}, hostile.name


def test_a_catalogue_builds_over_all_that_was_ingested(corpus):
    keys = [key for hostile in CASES for key in corpus.outcome(hostile).keys]
    catalogue.build(corpus.store, keys)
    votes = read(corpus.store, schemas.VOTES, keys)
    resolved = catalogue.resolved_votes(corpus.store, keys).collect()
    assert resolved["vote_id"].sort().to_list() == votes["vote_id"].sort().to_list()
    pairs = catalogue.all_pairs(corpus.store).collect()
    assert pairs["human_label_0"].is_between(0, 1).all()


# --- payloads: alone, and all of them in every layout, copied and referred to -----------------------------------------------------------


@pytest.mark.parametrize("payload", PAYLOADS, ids=lambda p: p.name)
def test_a_payload_has_its_status_and_gives_a_picture_or_undecodable(payload):
    header = images.read_header(payload.data)
    assert header.status == payload.status
    assert payload.said in (header.reason or "")
    assert (header.reason is None) == (header.status == "ok")
    assert images.read_header(pa.py_buffer(payload.data)) == header
    if header.status != "ok":
        return
    outcome = _decode(payload.data)
    assert outcome == (header.width, header.height) or (isinstance(outcome, str) and outcome)
    assert payload.decodes is None or isinstance(outcome, tuple) == payload.decodes


def _decode(data):
    """Return the size of the picture, or why there is none."""
    try:
        return images.decode_rgb(data).size
    except images.UndecodableImage as error:
        return str(error)


def _decoded(store, key, image_ids):
    """Return {image id: (status, sha256, what decoding gives)} of a shard as it is read for scoring."""
    found = {}
    for part in stored.read_images(store, key, image_ids, 7):
        for row in part:
            outcome = None if row.data is None else _decode(row.data)
            assert (row.status == "ok") == (row.reason is None) == (row.data is not None)
            found[row.image_id] = (row.status, row.data and hashlib.sha256(row.data).hexdigest(), outcome)
    return found


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_payload_in_every_layout_has_its_status_and_gives_a_picture_or_undecodable(container, tmp_path):
    layout, write = CONTAINERS[container]
    raw = tmp_path / "raw"
    raw.mkdir()
    write(raw, [p.data for p in PAYLOADS])
    source = SourceConfig(name="all", layout=layout, location=str(raw))
    before, read_back = tree(raw), {}
    corpora = {s: Corpus(tmp_path / s) for s in ("copy", "reference")}
    for storage, corpus in corpora.items():
        if storage == "reference" and not ingest.list_source(source)[0].is_seekable:
            continue
        (key,), _ = corpus.ingest(source, LimitsConfig(), storage)
        held = read(corpus.store, schemas.IMAGES, [key])
        votes = read(corpus.store, schemas.VOTES, [key])
        assert votes["source_row"].n_unique() == len(PAYLOADS)
        assert set(votes["status"]) == {"ok"}
        assert held["bytes"].is_null().all() == (storage == "reference")
        facts = {row["sha256"]: row for row in held.iter_rows(named=True)}
        read_back[storage] = _decoded(corpus.store, key, held["image_id"].to_list())
        assert set(read_back[storage]) == set(held["image_id"])
        for payload in PAYLOADS:
            if container == "pickapic_base64" and not payload.data:
                # No text is no image; its uid says which.
                assert held.filter(pl.col("status") == "no_bytes").height == 1
                continue
            fact = facts[hashlib.sha256(payload.data).hexdigest()]
            assert fact["status"] == payload.status, payload.name
            assert payload.said in (fact["reason"] or ""), payload.name
            status, digest, outcome = read_back[storage][fact["image_id"]]
            assert status == payload.status, payload.name
            assert digest == (fact["sha256"] if status == "ok" else None), payload.name
            if status == "ok" and payload.decodes is not None:
                assert (outcome == (fact["width"], fact["height"])) == payload.decodes, payload.name
    assert tree(raw) == before
    if len(read_back) == 2:
        assert read_back["copy"] == read_back["reference"]


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "gone": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "other": lambda file: file.write_bytes(HTML),
    "garbled": lambda file: file.write_bytes(bytes(255 - b for b in file.read_bytes())),
    "folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    "container", ["pickapic", "webdataset_tar", "hpd_folder", "hpd_tar", "rapidata", "pairs_paths"]
)
def test_an_image_that_is_referred_to_and_damaged_later_gives_a_status(container, damage, tmp_path):
    layout, write = CONTAINERS[container]
    raw = tmp_path / "raw"
    raw.mkdir()
    write(raw, [jpeg(1000), jpeg(1001)])
    corpus = Corpus(tmp_path)
    (key,), _ = corpus.ingest(SourceConfig(name="later", layout=layout, location=str(raw)), LimitsConfig(), "reference")
    held = read(corpus.store, schemas.IMAGES, [key])
    for uri in set(held["uri"]):
        DAMAGE[damage](Path(uri))
    found = _decoded(corpus.store, key, held["image_id"].to_list())
    assert set(found) == set(held["image_id"])
    assert {status for status, _, _ in found.values()} <= {"missing", "changed", "ok"}
    assert any(status != "ok" for status, _, _ in found.values())


@pytest.mark.parametrize("layout", ["hpd", "hpdv3"])
def test_a_record_as_deep_as_the_parser_allows_costs_its_row_or_its_shard(layout, tmp_path):
    make = {"hpd": hpd_record, "hpdv3": hpdv3_record}[layout]
    corpus = Corpus(tmp_path)
    outcomes = Counter()
    for depth in range(860, 1000, 2):
        raw = tmp_path / f"raw{depth}"
        record = json.dumps(make(0, prompt="?", more="?"))
        deep = "[" * depth + "]" * depth
        for field_name in ("prompt", "more"):
            listed = record.replace(f'"{field_name}": "?"', f'"{field_name}": {deep}')
            write_json(raw / "train.json", f"[{listed}]".encode())
            source = SourceConfig(name=f"{field_name}{depth}", layout=layout, location=str(raw))
            with no_longer_than(SECONDS_PER_CASE):
                try:
                    (shard,) = ingest.list_source(source)
                    ingest.LAYOUTS[layout].fingerprint(source, shard)
                    rows = sum(c.rows for c in ingest.LAYOUTS[layout].read_shard(source, shard, LimitsConfig()))
                    outcomes[f"{rows} row"] += 1
                except SourceError as error:
                    outcomes["refused by name" if "train.json" in str(error) else str(error)] += 1
    assert set(outcomes) == {"1 row", "refused by name"}
    assert corpus.store.manifests("votes") == []
