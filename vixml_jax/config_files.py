"""Where config files lie: at the path that is given, or among those that come with the package.

In a checkout that is its folder `configs/`; an installed package carries a copy of it.
"""

from __future__ import annotations

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
