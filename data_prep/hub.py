"""Files of a dataset repository on the Hugging Face hub, with sizes and checksums before they are fetched."""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from data_prep.transfers import Client, Failed
from vixml_jax.errors import UserError


class HubFile(NamedTuple):
    """A file of a repository.

    Attributes:
      path: within the repository.
      url: where it is fetched.
      size: in bytes.
      sha256: in hex; "" for small files, which the hub names by another hash.
    """

    path: str
    url: str
    size: int
    sha256: str


def listing(client: Client, hub: str, repo: str, revision: str) -> list[HubFile]:
    """Lists a dataset repository.

    Raises:
      UserError: if it cannot be listed.
    """
    at = urllib.parse.quote(revision, safe="")
    url = f"{hub.rstrip('/')}/api/datasets/{repo}/tree/{at}?recursive=true"
    try:
        entries = json.loads(client.fetch(url))
        found = [
            HubFile(
                entry["path"],
                f"{hub.rstrip('/')}/datasets/{repo}/resolve/{at}/{urllib.parse.quote(entry['path'])}",
                int(entry["size"]),
                str((entry.get("lfs") or {}).get("oid", "")).removeprefix("sha256:"),
            )
            for entry in entries
            if entry["type"] == "file"
        ]
    except Failed as failure:
        raise UserError(failure.reason, file=url, fix="look at --hub_url and --hub_repo") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError("not a list of files", file=url, fix="look at --hub_url and --hub_repo") from None
    return found


def pick(files: Sequence[HubFile], folders: Sequence[str], name: str, repo: str) -> HubFile:
    """Finds a file by its name, in the first of `folders` that has it at whatever depth.

    Raises:
      UserError: if none has.
    """
    for folder in folders:
        for file in files:
            path = PurePosixPath(file.path)
            if path.name == name and folder.lower() in (part.lower() for part in path.parts[:-1]):
                return file
    there = sorted({str(PurePosixPath(file.path).parent) for file in files})
    problem = f"no {name} below {' or '.join(folders)}"
    raise UserError(problem, file=repo, fix=f"its folders are {', '.join(there) or 'none'}")
