"""Every reader of files that may come from others, by name."""

from __future__ import annotations

import data_readers
import run_readers
import tower_readers

READERS = {
    reader.name: reader for reader in (*data_readers.READERS, *tower_readers.READERS, *run_readers.READERS)
}
