"""Labels that came, changed or went after training, as they lie in `workdir/labels_changed`.

`changes.jsonl` has a line for every label that is not as the dataset has it: {"number", "uid", "title",
"content", "images", "removed"}. Pictures are copied to `images`, under the hash of their bytes. Texts and
pictures are kept, not embeddings: after more training they are embedded again.

A label's number is its for good: new ones follow those of the dataset and the earlier ones, whether these
were removed or not, and a label that comes back gets its old number.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vixml_jax import files
from vixml_jax.errors import UserError

DIRECTORY, CHANGES, IMAGES = "labels_changed", "changes.jsonl", "images"
# In place of a fingerprint: the label is gone.
GONE = "removed"


@dataclasses.dataclass(frozen=True)
class Change:
    """A label that is not as the dataset has it.

    Attributes:
      number: what predictions call it; below L for a label of the dataset.
      uid, title, content: its texts.
      images: names of files in the directory of pictures.
      removed: whether it is gone.
    """

    number: int
    uid: str
    title: str
    content: str
    images: tuple[str, ...] = ()
    removed: bool = False

    @property
    def fingerprint(self) -> str:
        """Changes with what its embedding depends on."""
        return GONE if self.removed else files.fingerprint(self.title, self.content, self.images)

    @property
    def key(self) -> tuple[int, str]:
        """Under which what was computed of the label is kept."""
        return self.number, self.fingerprint


class LabelChanges:
    """All changes of a run, by label number.

    Args:
      directory: `workdir/labels_changed`; need not exist.
      num_known: L, labels of the dataset.
      changes: as read from there.
    """

    def __init__(self, directory: Path, num_known: int, changes: Iterable[Change] = ()):
        self.directory, self.num_known = directory, num_known
        self.by_number = {change.number: change for change in changes}

    @classmethod
    def load(cls, workdir: Path, num_known: int) -> LabelChanges:
        """Reads the changes of a run; none where there are none.

        Raises:
          UserError: naming the line, if the file is damaged.
        """
        directory = workdir / DIRECTORY
        path = directory / CHANGES
        if not path.is_file():
            return cls(directory, num_known)
        changes = []
        for row, line in enumerate(path.read_bytes().removesuffix(b"\n").split(b"\n"), 1):
            try:
                changes.append(_change(json.loads(line)))
            except (ValueError, TypeError, KeyError, RecursionError):
                raise UserError(
                    "not a changed label", file=path, row=row, fix="bring back the file as it was written"
                ) from None
        return cls(directory, num_known, changes)

    def save(self) -> None:
        """Writes the changes."""
        with files.atomic_file(self.directory / CHANGES, "w") as file:
            for number in sorted(self.by_number):
                file.write(json.dumps(dataclasses.asdict(self.by_number[number]), ensure_ascii=False) + "\n")

    def __bool__(self) -> bool:
        return bool(self.by_number)

    @property
    def total(self) -> int:
        """One above the highest label number there is or was."""
        return max(self.num_known, 1 + max(self.by_number, default=-1))

    @property
    def there(self) -> list[Change]:
        """The changed labels that are not gone, by number."""
        return [self.by_number[n] for n in sorted(self.by_number) if not self.by_number[n].removed]

    @property
    def new(self) -> list[Change]:
        """Those of them that training has not seen."""
        return [change for change in self.there if change.number >= self.num_known]

    @property
    def removed(self) -> np.ndarray:
        """Numbers of the labels that are gone, int64, increasing."""
        return np.array(sorted(n for n, change in self.by_number.items() if change.removed), np.int64)

    def fingerprints(self) -> dict[str, str]:
        """Number, as text, -> fingerprint of the change: what an index holds, in its file."""
        return {str(number): self.by_number[number].fingerprint for number in sorted(self.by_number)}

    def pictures(self, change: Change) -> list[Path]:
        """Where the pictures of a label lie."""
        return [self.directory / IMAGES / name for name in change.images]

    def add(self, records: Sequence[dict[str, Any]], known_uids: Iterable[str]) -> tuple[int, int]:
        """Takes in labels, each replacing the one of its uid if there is one.

        Args:
          records: "uid", "title", "content", and "images" as paths of readable files or bytes.
          known_uids: those of the dataset's labels, in order.

        Returns:
          How many are new (or came back), and how many replace one that is there.

        Raises:
          UserError: if a uid is that of several labels of the dataset.
        """
        numbers = self._numbers({record["uid"] for record in records}, known_uids)
        new, following = 0, self.total
        for record in records:
            uid = record["uid"]
            if len(numbers.get(uid, [])) > 1:
                raise UserError(
                    f"uid {uid!r} is that of {len(numbers[uid])} labels of the dataset",
                    fix="give a uid that is that of one label, or a new one",
                )
            if uid not in numbers:
                numbers[uid], following = [following], following + 1
                new += 1
            else:
                number = numbers[uid][0]
                new += number in self.by_number and self.by_number[number].removed
            images = tuple(self._keep(image) for image in record["images"])
            number = numbers[uid][0]
            self.by_number[number] = Change(number, uid, record["title"], record["content"], images)
        return new, len(records) - new

    def remove(self, uids: Sequence[str], known_uids: Iterable[str]) -> int:
        """Takes labels out; returns how many were there until now.

        Raises:
          UserError: if there is no label of a uid, or none would be left.
        """
        numbers = self._numbers(set(uids), known_uids)
        count = 0
        for uid in uids:
            if uid not in numbers:
                raise UserError(f"no label has the uid {uid!r}", fix="give uids of labels that there are")
            for number in numbers[uid]:
                change = self.by_number.get(number, Change(number, uid, "", ""))
                count += not change.removed
                self.by_number[number] = dataclasses.replace(change, removed=True)
        if self.total == len(self.removed):
            raise UserError("no label would be left", fix="keep at least one")
        return count

    def _numbers(self, uids: set[str], known_uids: Iterable[str]) -> dict[str, list[int]]:
        """The label numbers of each of `uids` that has any."""
        found: dict[str, list[int]] = {}
        for number, uid in enumerate(known_uids):
            if uid in uids:
                found.setdefault(uid, []).append(number)
        for number, change in self.by_number.items():
            if number >= self.num_known and change.uid in uids:
                found.setdefault(change.uid, []).append(number)
        return found

    def _keep(self, image: Path | bytes) -> str:
        """Copies a picture, unless it is there already; returns its name."""
        content = image if isinstance(image, bytes) else image.read_bytes()
        name = hashlib.sha256(content).hexdigest()[:32]
        path = self.directory / IMAGES / name
        if not path.is_file():
            with files.atomic_file(path) as file:
                file.write(content)
        return name


def _change(record: Any) -> Change:
    change = Change(**{**record, "images": tuple(record["images"])})
    texts = (change.uid, change.title, change.content, *change.images)
    if type(change.number) is not int or not 0 <= change.number < 2**31:
        raise ValueError("number")
    if not all(isinstance(text, str) for text in texts) or type(change.removed) is not bool:
        raise TypeError("texts")
    # Names of pictures are ours, and none leads elsewhere.
    if not all(re.fullmatch("[0-9a-f]{32}", name) for name in change.images):
        raise ValueError("images")
    return change


def numbers_of(num_known: int, fingerprints: dict[str, str]) -> np.ndarray:
    """The labels of an index that was built with these changes: int32, increasing; one a row."""
    gone = [int(number) for number, print_ in fingerprints.items() if print_ == GONE]
    added = [int(n) for n, print_ in fingerprints.items() if print_ != GONE and int(n) >= num_known]
    known = np.setdiff1d(np.arange(num_known), gone, assume_unique=True)
    return np.concatenate([known, np.sort(added)]).astype(np.int32)
