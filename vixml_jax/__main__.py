"""`python -m vixml_jax` is `vixml`."""

from __future__ import annotations

import sys

from vixml_jax import cli

if __name__ == "__main__":
    sys.exit(cli.run())
