"""What went wrong in a config file or in an override of one of its fields, in one line."""

from __future__ import annotations

import difflib
import re
import traceback
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from vixml_jax import config_files
from vixml_jax.errors import UserError

PACKAGE = Path(__file__).parent
OVERRIDE_FIX = "overrides are --config.section.field=value"


def explained(error: Exception, arguments: Sequence[str]) -> Exception:
    """Returns a UserError for what parsing `--config` and its overrides raised, or a bug as it is.

    Args:
      error: what the parsing raised.
      arguments: the command's arguments.
    """
    if isinstance(error, UserError):
        return error
    value = config_files.value_of("config", arguments)
    if value is None:
        return error
    path = Path(value.partition(":")[0])
    if not path.is_file():
        return UserError(
            "no such config file", file=path, fix="give --config=FILE, as in configs/demo.py[:arg]"
        )
    if isinstance(error, SyntaxError):
        return UserError(f"not valid Python ({error.msg})", file=error.filename or path, row=error.lineno)
    frames = traceback.extract_tb(error.__traceback__)
    rows = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path.resolve()]
    if rows:
        # Run by the config file. If the last frame is in this package, the package is at fault.
        if frames and Path(frames[-1].filename).resolve().is_relative_to(PACKAGE):
            return error
        return UserError(_one_line(error), file=path, row=rows[-1])
    # What Python's parser says of brackets within brackets within brackets.
    if isinstance(error, (MemoryError, RecursionError)) and Path(frames[-1].filename).name == "ast.py":
        return UserError("an override's name is nested too deeply", fix=OVERRIDE_FIX)
    if "get_config" in str(error):
        return UserError("has no function get_config", file=path, fix="define get_config(arg='')")
    if isinstance(error, (AttributeError, KeyError, TypeError, ValueError)):
        config = flags.FLAGS["config"].parser.parse(value)
        unknown = unknown_field(arguments, config) if isinstance(config, ConfigDict) else None
        if unknown:
            return unknown
    if (
        isinstance(error, (KeyError, TypeError, ValueError, OverflowError))
        and "ml_collections" in frames[-1].filename
    ):
        return UserError(_one_line(error), fix=OVERRIDE_FIX)
    return error


def unknown_field(arguments: Sequence[str], config: ConfigDict) -> UserError | None:
    """Returns what to say of the first override that names no field of the config."""
    fields = _fields(config)
    for argument in arguments:
        match = re.fullmatch(r"--?(?:no)?config\.([^=]+)(?:=.*)?", argument, re.DOTALL)
        if match is None or match[1] in fields:
            continue
        section, _, _ = match[1].rpartition(".")
        # Of the same section if there is one, so that a short name is not led astray.
        candidates = [field for field in fields if field.rpartition(".")[0] == section] or fields
        near = difflib.get_close_matches(match[1], candidates, n=1, cutoff=0.0)
        return UserError(f"unknown config field config.{match[1]}", fix=f"did you mean config.{near[0]}?")
    return None


def _fields(config: ConfigDict, prefix: str = "") -> list[str]:
    fields: list[str] = []
    for name, value in config.items():
        fields.append(prefix + name)
        if isinstance(value, ConfigDict):
            fields += _fields(value, f"{prefix}{name}.")
    return fields


def _one_line(error: Exception) -> str:
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    # ConfigDict quotes its message as if it were a key.
    return f"{type(error).__name__}: " + " ".join(
        text.replace("\\n", " ").replace("\\'", "'").strip("'\"").split()
    )
