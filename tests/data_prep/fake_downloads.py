"""Small files in the real downloads' formats: archives of the repository, a hub with the ViXML release."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import raw_folders

from data_prep import repository, sources

REPO = "someone/vixml_data"
EMBEDDINGS = np.random.default_rng(0).normal(size=(3, 1152)).astype(np.float32)


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        # Of no time: always the same bytes.
        for name, data in members.items():
            packed.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def json_lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def raw_zip(folder: str = "LF-Amazon-131K", packed: bool = True, filters: bool = True) -> bytes:
    """The repository's archive of raw texts."""
    members = {f"{folder}/": b""}
    for name, rows in raw_folders.ROWS.items():
        data = json_lines(rows)
        members[f"{folder}/{name}.json{'.gz' * packed}"] = gzip.compress(data, mtime=0) if packed else data
    if filters:
        members |= {f"{folder}/{name}": b"0 1\n" for name in repository.FILTERS}
    return zipped(members | {f"{folder}/Yf.txt": b"not wanted"})


def mm_zip(pictures: str = "http://127.0.0.1") -> bytes:
    """The archive of MM-AmazonTitles-300K: latin-1 texts after an arrow, labels apart, a list of pictures."""
    folder = "MM-AmazonTitles-300K"
    members = {f"{folder}/img.urls.txt": f"a\t{pictures}/1.jpg\nl1\t{pictures}/2.jpg\n".encode()}
    for short, (text, labels) in repository.TEXTS.items():
        rows = raw_folders.ROWS[short]
        lines = [f"{row['uid']}->{row['title'].encode('ascii', 'replace').decode()} é\n" for row in rows]
        members[f"{folder}/raw_data/{text}"] = "".join(lines).encode("latin-1")
        if labels:
            pairs = [" ".join(f"{label}:1.0" for label in row["target_ind"]) for row in rows]
            text = "\n".join([f"{len(rows)} {len(raw_folders.LABELS)}", *pairs]) + "\n"
            members[f"{folder}/{labels}"] = text.encode()
    return zipped(members | {f"{folder}/{name}": b"0 1\n" for name in repository.FILTERS})


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def release(pictures: str = "http://127.0.0.1") -> dict[str, bytes]:
    """The ViXML release's files of a dataset: float32 embeddings, and object arrays that map rows to them."""
    urls, images_of = io.BytesIO(), np.empty(2, object)
    table = pa.table({"id": ["a", "a", "l1"], "url": [f"{pictures}/1", f"{pictures}/2", "ftp://x"]})
    pyarrow.parquet.write_table(table, urls)
    images_of[:] = [[0, 2], -1]
    embeddings = dict.fromkeys(sources.EMBEDDINGS, npy(EMBEDDINGS))
    return {sources.URL_LIST: urls.getvalue(), **embeddings, **dict.fromkeys(sources.MAPS, npy(images_of))}


def serve_hub(server, folders: dict[str, dict[str, bytes]], **page) -> None:
    """Serves a repository as the hub does: a list with checksums, and addresses that redirect elsewhere.

    Args:
      server: the fake server.
      folders: files by name, of each folder.
      page: how the server misbehaves.
    """
    entries: list[dict] = []
    for folder, files in folders.items():
        entries.append({"type": "directory", "path": folder, "oid": "1" * 40, "size": 0})
        for name, data in {f"{folder}/{name}": data for name, data in files.items()}.items():
            lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 133}
            entries.append({"type": "file", "path": name, "oid": "2" * 40, "size": len(data), "lfs": lfs})
            target = server.add(f"/cdn/{name}", data, **page)
            server.add(f"/datasets/{REPO}/resolve/main/{name}", status=302, headers={"Location": target})
    entries.append({"type": "file", "path": "README.md", "oid": "3" * 40, "size": 7})
    server.add(f"/api/datasets/{REPO}/tree/main?recursive=true", json.dumps(entries).encode())
