"""Forty picture files as the web and ill will make them: the run lives, and names each with its reason."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from vixml_jax import data
from vixml_jax.data import image_bank
from vixml_jax.prepare import prepare

GOOD = ("good.jpg", "good.png")


def _encoded(form: str, size: tuple[int, int] = (64, 48), **options) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (*size[::-1], 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, form, **options)
    return buffer.getvalue()


def _chunk(kind: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


def _png(width: int, height: int, body: bytes = b"", before: bytes = b"") -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + before + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


def _contents() -> dict[str, bytes]:
    """Names of files and what is in them."""
    jpeg, png, gif, webp, tiff, bmp = map(_encoded, ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"))
    middle = len(png) // 2
    bomb = zlib.compress(bytes(10 << 20))
    return {
        "empty.jpg": b"",
        "one_byte.jpg": b"\xff",
        "blank.png": b" " * 100,
        "zeros.jpg": bytes(5000),
        "noise.jpg": random.Random(0).randbytes(5000),
        "page.jpg": b"<!doctype html><title>404</title>",
        "words.png": b"The picture is no longer available.\n",
        "error.json.jpg": b'{"error": "rate limited"}',
        "vector.svg": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        "program.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%stdout) (w) file\n",
        "paper.pdf": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n",
        "packed.jpg": gzip.compress(jpeg),
        "archive.png": b"PK\x03\x04" + bytes(60),
        "shell.png": b"#!/bin/sh\nexit 1\n",
        "jpeg_head.jpg": jpeg[:20],
        "jpeg_half.jpg": jpeg[: len(jpeg) // 2],
        "jpeg_most.jpg": jpeg[:-200],
        "jpeg_no_tables.jpg": jpeg[:2] + jpeg[jpeg.index(b"\xff\xc0") :],
        "png_signature.png": png[:8],
        "png_half.png": png[:middle],
        "png_flipped.png": png[:middle] + bytes([png[middle] ^ 255]) + png[middle + 1 :],
        "png_short.png": _png(64, 64, zlib.compress(b"few")),
        "png_no_zlib.png": _png(64, 64, b"not zlib"),
        "png_wide.png": _png(2**31 - 1, 1),
        "png_bomb.png": _png(100_000, 100_000, bomb),
        "png_large.png": _png(9_000, 9_000, bomb),
        "png_text_bomb.png": _png(4, 4, zlib.compress(bytes(52)), _chunk(b"zTXt", b"k\0\0" + bomb)),
        "gif_head.gif": gif[:13],
        "gif_half.gif": gif[: len(gif) // 3],
        "webp_half.webp": webp[: len(webp) // 2],
        "webp_length.webp": webp[:4] + b"\xff\xff\xff\xff" + webp[8:40],
        "tiff_half.tif": tiff[: len(tiff) // 2],
        "tiff_loop.tif": b"II*\0\x08\0\0\0" + struct.pack("<H", 0) + struct.pack("<I", 8),
        "bmp_huge.bmp": bmp[:18] + struct.pack("<ii", 2**30, 2**30) + bmp[26:],
        "bmp_half.bmp": bmp[:200],
    }  # fmt: skip


def _write(folder: Path) -> list[str]:
    """Writes forty bad files and two good ones; returns the names of the bad ones."""
    folder.mkdir()
    contents = _contents()
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "directory.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    (folder / "device.jpg").symlink_to("/dev/zero")
    (folder / "circle.jpg").symlink_to(folder / "circle.jpg")
    with open(folder / "terabytes.jpg", "wb") as file:
        file.truncate(4 << 40)  # sparse
    (folder / GOOD[0]).write_bytes(_encoded("JPEG", (300, 2)))
    (folder / GOOD[1]).write_bytes(_encoded("PNG"))
    bad = [*contents, "directory.jpg", "pipe.jpg", "device.jpg", "circle.jpg", "terabytes.jpg"]
    assert len(bad) == 40
    return bad


# What a name must be reported with; all others with one of OTHER_REASONS.
REASONS = {
    "empty.jpg": "an empty file",
    "png_bomb.png": "a picture too large",
    "png_large.png": "a picture too large",
    "png_wide.png": "a picture too large",
    "bmp_huge.bmp": "a picture too large",
    "directory.jpg": "a directory",
    "pipe.jpg": "a device, pipe or socket",
    "device.jpg": "a device, pipe or socket",
    "circle.jpg": "a file that cannot be opened",
    "terabytes.jpg": "a file too large",
}
OTHER_REASONS = ("not a picture of a known format", "a broken picture")


def _is_right(name: str, problem: str) -> bool:
    return problem == REASONS.get(name) or (name not in REASONS and problem in OTHER_REASONS)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # what Pillow says of them beside raising
def test_prepare_names_each_file_and_the_reason(tmp_path):
    raw = tiny.write_raw(tmp_path / "raw", seed=0, num_train=12, num_test=4, images=False)
    bad = _write(raw / "pictures")
    names = [*bad[:20], GOOD[0], *bad[20:], GOOD[1]]
    lines = [f"trn{number % 11},pictures/{name}" for number, name in enumerate(names)]
    (raw / "img_paths.trn.csv").write_text("\n".join(["uid,path", *lines, "trn11,pictures/none.jpg"]) + "\n")
    prepare(raw, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    named = {finding["name"].removeprefix("pictures/"): finding for finding in report["rejected"]}
    assert named.keys() == set(bad)
    for name, finding in named.items():
        assert _is_right(name, finding["problem"]), finding
        assert (finding["file"], finding["line"]) == ("img_paths.trn.csv", names.index(name) + 2)
        assert finding["done"] == "counted as missing"
    assert sum(report["problems"].values()) == 40
    counts = report["splits"]["train"]
    assert (counts["images"], counts["images_missing"]) == (2, 41)
    # And again: nothing has changed, and nothing is read differently.
    assert prepare(raw, tmp_path / "out")["unchanged"]
    images = data.load(tmp_path / "out").train.images
    assert sorted(data for item in images for data in item if data) == sorted(
        (raw / "pictures" / name).read_bytes() for name in GOOD
    )


class _Files(list):
    """One picture an item, as a dataset of another origin might hold them."""

    def digests(self):
        named = b"".join(hashlib.sha256(data).digest()[:16] for (_, data) in self)
        return np.frombuffer(named, np.uint8).reshape(-1, 16), np.ones(len(self), np.int64)

    def __getitem__(self, item):
        return [list.__getitem__(self, item)[1]]

    def name(self, item, place):
        return {"name": list.__getitem__(self, item)[0], "picture": place + 1}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_the_bank_names_each_picture_and_the_reason(tmp_path):
    bad = _write(tmp_path / "pictures")
    found = [(name, (tmp_path / "pictures" / name).read_bytes()) for name in (*_contents(), *GOOD)]
    tower = image_bank.FrozenTower(
        lambda pixels: pixels.mean((1, 2)), {"size": 8, "mean": (0, 0, 0), "std": (1, 1, 1)}, 3, 4
    )
    bank = image_bank.build_or_load(_Files(found), tower, tmp_path / "cache", "train")
    assert (bank.slots[:, 0] >= 0).tolist() == [name in GOOD for name, _ in found]
    report = json.loads(next((tmp_path / "cache").glob("*/report-train.json")).read_text())
    assert [problem["name"] for problem in report["unreadable"]] == [
        name for name in bad if name in _contents()
    ]
    for problem in report["unreadable"]:
        assert _is_right(problem["name"], problem["problem"]), problem
    # New items' pictures come from anywhere: the same files, opened by path.
    paths = [[str(tmp_path / "pictures" / name)] for name in (*bad, *GOOD)]
    present = image_bank.build(paths, tower).slots[:, 0] >= 0
    assert present.tolist() == [False] * 40 + [True, True]
