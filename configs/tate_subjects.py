"""LF-TateSubjects: subject terms of artworks from title, artist, date, medium and group.

  git clone --depth=1 https://github.com/tategallery/collection
  python -m data_prep.tate --checkout=collection --out=raw/LF-TateSubjects
  vixml prepare --raw=raw/LF-TateSubjects --out=data/tate_subjects --name=lf_tate_subjects
  vixml train --config=configs/tate_subjects.py --config.text.checkpoint=MINILM_L6_DIR \
      --config.dataset.dir=data/tate_subjects --workdir=runs/tate

Arguments: loss (of recipes.LOSSES, with its prototypes, instead of the one chosen here), smoke. Figures and
minutes: docs/results.md. Chosen on held-out training queries (--config.dataset.holdout=0.04), never on the
test split.
"""

from ml_collections import ConfigDict

from vixml_jax import config as config_lib
from vixml_jax import recipes


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config for the argument, as in "loss=prime"."""
    args = config_lib.parse_arg(arg, loss="", smoke=False)
    config = config_lib.base()
    config.dataset.dir = "data/tate_subjects"
    config.dataset.fields = ("title", "content")  # artist, date, medium and group stand in the content
    config.text.checkpoint = "random:minilm-l6"
    config.text.dtype = "bfloat16"
    # A softmax over the batch, as on PictoTags, where the PRIME loss collapses; it was not tried here.
    config.loss.name = "decoupled_softmax"
    config.loss.temperature = 0.05
    config.loss.positives = "uniform"  # half of the labels have one query; the frequent ones make P@1
    config.optimizer.lr = 2e-4
    config.optimizer.head_lr = 1e-3
    config.optimizer.warmup_steps = 30
    config.mining.start = 1  # of a run of more epochs: one has no clusters yet
    config.mining.every = 1
    config.mining.double_at = ()
    config.train.epochs = 1
    config.train.batch_size = 512
    config.checkpoint.every_steps = 50
    config.retrieval.query_weight = 0.1  # ViXML; on held-out queries 0.1 to 0.9 are alike, 0 is far behind
    config.retrieval.neighbours = 300
    if args.loss:
        recipes.set_loss(config, args.loss)
    if args.smoke:
        config_lib.shrink(config)
    return config
