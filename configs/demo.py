"""The embedded catalogue: needs no data, it is drawn at first use.

  vixml train --config=configs/demo.py:images=3 --workdir=runs/demo/vixml

`vixml demo` runs it with images=0 and images=3 and shows both. Arguments: images (0 = text only), smoke.
"""

from ml_collections import ConfigDict

from vixml_jax import config as config_lib
from vixml_jax.demo import get_config as demo_config


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config of one of the demo's two runs."""
    return demo_config(**config_lib.parse_arg(arg, images=0, smoke=False))
