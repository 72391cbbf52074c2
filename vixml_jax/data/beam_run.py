"""A function called for every item by a Beam runner: in this process, in several, or on other machines.

Beam is an extra of its own, and imported here only.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from vixml_jax.errors import UserError
from vixml_jax.progress import announced

DIRECT = "DirectRunner"
RUNNERS = (DIRECT, "DataflowRunner", "SparkRunner", "FlinkRunner")
# Beam's DirectRunner first looks for a program to download that minds neither the number of workers nor the
# mode they run in. This is what it falls back to.
_LOCAL_RUNNER = "apache_beam.runners.portability.fn_api_runner.FnApiRunner"
# Their job servers know more options than Beam's Python part does.
_WITH_JOB_SERVER = ("SparkRunner", "FlinkRunner")
# The line of a traceback that names the error.
_ERROR = re.compile(r"^[A-Za-z_][\w.]*: ", re.MULTILINE)


class BeamRun:
    """A runner with its options, ready to run one pipeline.

    Args:
      runner: one of RUNNERS.
      options: Beam's pipeline options, such as `--direct_num_workers=4`.

    Raises:
      UserError: if Beam is not installed, an option is not one of its, or the runner wants other ones.
    """

    def __init__(self, runner: str, options: Sequence[str] = ()):
        if runner not in RUNNERS:
            raise UserError(f"unknown Beam runner {runner!r}", fix=f"one of {', '.join(RUNNERS)}")
        self._runner = runner
        with _silenced(None):  # notes about packages of other runners
            try:
                self._beam: Any = importlib.import_module("apache_beam")
            except ImportError as error:
                problem = f"Beam cannot be imported ({error})"
                raise UserError(problem, fix="pip install 'vixml-jax[beam]'") from None
            chosen = self._options(options)
            try:
                name = _LOCAL_RUNNER if runner == DIRECT else runner
                self._pipeline = self._beam.Pipeline(runner=name, options=chosen)
            except (ImportError, ValueError) as error:
                raise UserError(f"{runner} cannot be used: {error}", fix="see Beam's page about it") from None

    def each(self, function: Callable[[Any], None], items: Iterable[Any], title: str) -> None:
        """Calls `function(item)` for every item, in any order; a runner may call it again for one.

        Args:
          function: what pickle takes by name, or holds values only.
          items: small values.
          title: says what is under way.

        Raises:
          UserError: if the pipeline fails, with the reason of the first call that did.
        """
        beam = self._beam
        _ = (
            self._pipeline
            | "items" >> beam.Create(list(items))
            | "spread" >> beam.Reshuffle()
            | "call" >> beam.Map(function)
        )
        try:
            with announced(title), self._quiet():
                self._wait(self._pipeline.run())
        except Exception as error:
            problem = f"the pipeline of {self._runner} failed ({_reason(error)})"
            raise UserError(problem, fix=self._where_to_look()) from error

    def _wait(self, result: Any) -> None:
        try:
            result.wait_until_finish()
        except BaseException:  # nobody waits for what it writes any more
            with contextlib.suppress(Exception):
                result.cancel()
            raise

    def _options(self, given: Sequence[str]) -> Any:
        """Parses options as Beam does, which passes over those that it does not know."""
        options = importlib.import_module("apache_beam.options.pipeline_options")
        for option in given:
            if not re.match(r"--[A-Za-z]", option):
                raise UserError(f"no Beam option: {option!r}", fix="--beam_options=--name=value, one a flag")
            if option.partition("=")[0] == "--runner":
                raise UserError("the runner among the Beam options", fix="give --beam_runner")
        usage = io.StringIO()
        try:
            with contextlib.redirect_stderr(usage):
                parsed = options.PipelineOptions(list(given))
                known = parsed.get_all_options()
                all_ = parsed.get_all_options(retain_unknown_options=True)
        except SystemExit:
            reason = usage.getvalue().strip().rpartition("\n")[2].partition("error: ")[2]
            raise UserError(f"a Beam option is wrong: {reason}") from None
        unknown = sorted(all_.keys() - known.keys())
        if unknown and self._runner not in _WITH_JOB_SERVER:
            raise UserError(f"unknown Beam option --{unknown[0]}", fix="see Beam's page about its runner")
        return parsed

    @contextlib.contextmanager
    def _quiet(self) -> Iterator[None]:
        """Of a runner on this machine the reason says all; what others say is worth seeing."""
        if self._runner != DIRECT:
            yield
            return
        with _silenced("apache_beam"), _no_errors_printed():
            yield

    def _where_to_look(self) -> str | None:
        return None if self._runner == DIRECT else "the runner's own log says more"


@contextlib.contextmanager
def _silenced(name: str | None) -> Iterator[None]:
    """Silences a logger, None for all."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def _no_errors_printed() -> Iterator[None]:
    """Gives processes that are started meanwhile no error stream: each would print its start and end."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _reason(error: Exception) -> str:
    """The last error of what may be a worker's whole traceback, without the step that it ended."""
    text = str(error).strip()
    if "Traceback (most recent call last)" in text:
        named = list(_ERROR.finditer(text))
        text = text[named[-1].start() :] if named else text.rpartition("\n")[2]
    elif not _ERROR.match(text):
        text = f"{type(error).__name__}: {text}"
    return " ".join(text.partition(" [while running")[0].split())
