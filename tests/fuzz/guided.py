"""Fuzzes one reader with coverage as the guide (Atheris, libFuzzer): `make fuzz READER=sparse SECONDS=60`.

Needs the extra `fuzz`. Changes are those of `mutations` and libFuzzer's own by turns; what reaches new code
is kept in --corpus and changed further. An input that breaks the contract is written to --out, with the trace
on standard error, and ends it with exit code 77.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import tempfile
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["vixml_jax", "data_prep"]):
    import mutations
    import numpy as np
    import readers

    import vixml_jax.label_changes
    import vixml_jax.models.hub
    import vixml_jax.ownership
    import vixml_jax.report_runs
    import vixml_jax.retrieval.bank  # noqa: F401  (what readers import when they are first used)
    from vixml_jax.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reader", required=True, choices=sorted(readers.READERS))
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--out", type=Path, default=Path("."))
    options = parser.parse_args()
    reader = readers.READERS[options.reader]
    names = sorted(reader.seeds)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    folder = Path(tempfile.mkdtemp(prefix="fuzz"))
    reader.prepare(folder)

    # The first byte of an input says which of the reader's files it is.
    def packed(name: str, data: bytes) -> bytes:
        return bytes([names.index(name)]) + data

    def one_input(data: bytes) -> None:
        if not data:
            return
        with contextlib.suppress(UserError):
            reader.read(folder, names[data[0] % len(names)], data[1:])

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        rng = np.random.default_rng(seed)
        if not data or rng.random() < 0.5:
            return atheris.Mutate(data, most)
        others = [other for found in reader.seeds.values() for other in found]
        return (data[:1] + mutations.mutated(data[1:], rng, others))[:most]

    corpus = options.corpus or Path(tempfile.mkdtemp(prefix="corpus"))
    corpus.mkdir(parents=True, exist_ok=True)
    for name, found in reader.seeds.items():
        for number, data in enumerate(found):
            (corpus / f"seed-{name}-{number}").write_bytes(packed(name, data))
    flags = [
        f"-max_total_time={options.seconds}",
        "-timeout=10",
        "-rss_limit_mb=4096",
        f"-max_len={mutations.MOST_BYTES}",
        f"-artifact_prefix={options.out}/",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], str(corpus), *flags], one_input, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
