"""Small raw folders in every layout, for tests."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path

from PIL import Image

LABELS = [
    {"uid": "l0", "title": "red", "content": ""},
    {"uid": "l1", "title": "shoe", "content": "worn on feet"},
    {"uid": "l2", "title": "naïve art", "content": ""},
]
TRAIN = [
    {"uid": "a", "title": "Red shoe", "content": "size 42", "target_ind": [0, 1]},
    {"uid": "b", "title": "Ölbild", "content": "", "target_ind": [2]},
    {"uid": "c", "title": "nothing known", "content": "", "target_ind": []},
    {"uid": "d", "title": "boot 👢", "content": "two\nlines", "target_ind": [1]},
]
TEST = [
    {"uid": "e", "title": "clog", "content": "", "target_ind": [1]},
    {"uid": "f", "title": "red canvas", "content": "", "target_ind": [0, 2]},
]
ROWS = {"trn": TRAIN, "tst": TEST, "lbl": LABELS}


def picture(color: str = "red", form: str = "PNG") -> bytes:
    """Returns the bytes of a small picture."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), color).save(buffer, form)
    return buffer.getvalue()


def write_lines(path: Path, records: list, packed: bool = False) -> None:
    """Writes JSON lines; strings are written as they are."""
    lines = [
        record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records
    ]
    data = "".join(line + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if packed else data)


def json_folder(path: Path, packed: bool = True, **rows: list) -> Path:
    """Writes the layout `json`; `trn`, `tst`, `lbl` replace the rows of a file."""
    path.mkdir(parents=True, exist_ok=True)
    for name, default in ROWS.items():
        write_lines(path / f"{name}.json{'.gz' * packed}", rows.get(name, default), packed)
    return path


def text_folder(path: Path) -> Path:
    """Writes the layout `text`: the same rows, with content after a tab."""
    path.mkdir(parents=True, exist_ok=True)
    for name, rows in ROWS.items():
        lines = [
            row["title"] + ("\t" + row["content"].replace("\n", " ") if row["content"] else "")
            for row in rows
        ]
        (path / f"{name}.raw.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name in ("trn", "tst"):
        lines = [" ".join(f"{label}:1.00000" for label in row["target_ind"]) for row in ROWS[name]]
        (path / f"{name}_X_Y.txt").write_text("\n".join([f"{len(lines)} {len(LABELS)}", *lines]) + "\n")
    return path


def own_folder(path: Path, closed: bool = True) -> Path:
    """Writes the layout `jsonl`: the same rows, with label texts inline; `closed` adds labels.jsonl."""
    path.mkdir(parents=True, exist_ok=True)
    for file, rows in (("train", TRAIN), ("test", TEST)):
        own = [
            {
                "uid": row["uid"],
                "title": row["title"],
                "content": row["content"],
                "images": [],
                "labels": [LABELS[i]["title"] for i in row["target_ind"]],
            }
            for row in rows
        ]
        write_lines(path / f"{file}.jsonl", own)
    if closed:
        write_lines(path / "labels.jsonl", LABELS)
    return path


def image_list(path: Path, name: str, rows: list[tuple[str, str]]) -> None:
    """Writes img_paths.<name>.csv."""
    with open(path / f"img_paths.{name}.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("uid", "path"), *rows])
