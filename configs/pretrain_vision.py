"""A vision tower learned from a dataset's own training pictures, for where no pretrained one is at hand.

  vixml train --config=configs/pretrain_vision.py --config.dataset.dir=data/picto_tags --workdir=runs/pictures
  vixml export --workdir=runs/pictures --out=runs/pictures/tower --vision
  vixml train --config=configs/picto_tags.py:images=3 --config.vision.checkpoint=runs/pictures/tower \\
      --workdir=runs/picto

A training query is its pictures alone, its labels are texts, and the sigmoid loss (SigLIP, Zhai et al. 2023)
draws the two together. The tower is then frozen, and its embeddings are computed once as those of any other.
With a text tower that knows words (--config.text.checkpoint=MINILM_L6_DIR --config.text.layers=2
--config.optimizer.lr=2e-4) and images=3 fewer epochs make a better tower: docs/results.md.
Arguments: images (pictures used of an item), epochs, smoke.
"""

from ml_collections import ConfigDict

from vixml_jax import config as config_lib


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config for the argument, as in "images=1,epochs=10"."""
    args = config_lib.parse_arg(arg, images=1, epochs=10, smoke=False)
    config = config_lib.base()
    config.text.checkpoint = "random:minilm-tiny"  # only there to meet the pictures
    config.text.query_prompt = "{images}"
    config.text.dtype = "bfloat16"
    config.vision.train = "full"
    config.vision.images = args.images
    config.prototype.kind = "none"
    config.loss.name = "sigmoid"
    config.optimizer.lr = 5e-4
    config.optimizer.vision_lr = 5e-4
    config.optimizer.head_lr = 1e-3
    config.mining.start = args.epochs  # batches are random
    config.train.epochs = args.epochs
    config.train.batch_size = 256
    config.retrieval.kind = "exact"
    if args.smoke:
        config_lib.shrink(config)
    return config
