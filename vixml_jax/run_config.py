"""A run's own config as a config file: what overrides change where a --workdir is given and no --config."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from vixml_jax import config as config_lib


def get_config(workdir: str) -> ConfigDict:
    """Returns the config that began the run in `workdir`."""
    return config_lib.load(Path(workdir) / "config.json")
