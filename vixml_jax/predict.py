"""Predicts labels of new queries: `vixml predict --workdir=runs/demo/text --input=new.jsonl --output=-`.

Input is one JSON object a line: {"title": ..., "content": ..., "images": [paths], "uid": ...}; all but the
title may be left out. Output, in the same order: {"uid", "labels": [{"index", "uid", "title", "score"}]}.
Files of any length are read and written in constant memory. A line that is no such object ends the command,
and nothing is written; with --on_error=skip it is reported and left out.

Examples:
  vixml predict --workdir=runs/demo/vixml --input=new.jsonl --output=predicted.jsonl --k=10
  echo '{"title": "kettle"}' | vixml predict --workdir=runs/demo/text --input=- --output=-
"""

from __future__ import annotations

import json
import logging
import sys
from contextlib import ExitStack
from typing import IO

from absl import flags

from vixml_jax import files
from vixml_jax.data import query_lines
from vixml_jax.errors import UserError
from vixml_jax.progress import Progress
from vixml_jax.xmc_model import XmcModel

logger = logging.getLogger(__name__)


def define_flags() -> None:
    """Registers the command's flags."""
    flags.DEFINE_string("workdir", None, "Directory of the run")
    flags.DEFINE_string("input", None, "JSONL of queries, - for standard input")
    flags.DEFINE_string("output", None, "JSONL of predictions, - for standard output")
    flags.DEFINE_integer("k", 10, "Labels a query", lower_bound=1)
    flags.DEFINE_enum("on_error", "fail", ["fail", "skip"], "What a line that cannot be read does")


def main() -> int:
    """Runs the command."""
    for name in ("workdir", "input", "output"):
        if not flags.FLAGS[name].value:
            raise UserError(f"predict needs --{name}", fix="see `vixml predict --help`")
    source, left_out = flags.FLAGS.input, 0

    def leave_out(error: UserError) -> None:
        nonlocal left_out
        left_out += 1
        logger.warning("%s; left out", error)

    queries = query_lines.read_queries(
        sys.stdin if source == "-" else source,
        source,
        leave_out if flags.FLAGS.on_error == "skip" else None,
    )
    total = None if source == "-" else query_lines.count_queries(source) or None
    model = XmcModel.load(flags.FLAGS.workdir)
    with ExitStack() as stack:
        if flags.FLAGS.output == "-":
            target: IO[str] = sys.stdout
        else:
            target = stack.enter_context(files.atomic_file(flags.FLAGS.output, "w"))
        progress = stack.enter_context(Progress(total, "predict", "queries"))
        for record in model.predict_records(queries, flags.FLAGS.k):
            target.write(json.dumps(record, ensure_ascii=False) + "\n")
            progress.update()
    if left_out:
        logger.warning("%s: %d lines left out", source, left_out)
    return 0
