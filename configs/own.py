"""Your own catalogue, as `vixml prepare` made it.

  vixml prepare --raw=my_catalogue --out=data/mine
  vixml train --config=configs/own.py:images=3 --config.dataset.dir=data/mine --workdir=runs/mine

Arguments: images (0 = text only), epochs, smoke. Give --config.text.checkpoint a Hugging Face directory or
hub name; without one the tower starts from random weights.
"""

from ml_collections import ConfigDict

from vixml_jax import config as config_lib


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config for the argument, as in "images=3,epochs=20"."""
    args = config_lib.parse_arg(arg, images=0, epochs=10, smoke=False)
    config = config_lib.base()
    config.dataset.fields = ("title", "content")
    config.text.checkpoint = "random:minilm-l3"
    config.text.max_tokens = 48
    config.vision.images = args.images
    # A softmax over the batch learns from random weights, and where labels do not look like their queries:
    # on the demo's catalogue the PRIME loss collapsed.
    config.loss.name = "decoupled_softmax"
    config.loss.temperature = 0.05
    config.optimizer.head_lr = 1e-3
    config.mining.start = 4
    config.mining.every = 2
    config.mining.double_at = ()
    config.train.epochs = args.epochs
    config.train.batch_size = 512
    if args.smoke:
        config_lib.shrink(config)
    return config
