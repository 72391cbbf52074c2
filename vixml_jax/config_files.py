"""Where config files lie: at the path that is given, or among those that come with the package.

In a checkout that is its folder `configs/`; an installed package carries a copy of it. A run has a config of
its own, which overrides change where no other is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_PACKAGE = Path(__file__).parent
SHIPPED = (_PACKAGE / "configs", _PACKAGE.parent / "configs")


def find(config: str) -> str:
    """Returns `config`, its file where it lies.

    Args:
      config: "FILE" or "FILE:arguments". A FILE of the form configs/NAME that is not there becomes the one
        that comes with the package; any other stays as it is.
    """
    path, colon, arguments = config.partition(":")
    asked = Path(path)
    if not asked.exists() and asked.parent == Path("configs"):
        for folder in SHIPPED:
            if (folder / asked.name).is_file():
                return f"{folder / asked.name}{colon}{arguments}"
    return config


def of_run(workdir: str) -> str | None:
    """Returns what --config takes for the config of a run, None where `workdir` holds none."""
    if not (Path(workdir) / "config.json").is_file():
        return None
    return f"{_PACKAGE / 'run_config.py'}:{workdir}"


def value_of(flag: str, arguments: Sequence[str]) -> str | None:
    """Returns what the arguments of a command last give a flag, None where they do not have it."""
    found = None
    for i, argument in enumerate(arguments):
        name, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name == flag:
            found = value if equals else next(iter(arguments[i + 1 : i + 2]), None)
    return found
