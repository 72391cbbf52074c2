"""LF-AmazonTitles-1.3M: titles of products, 1,305,265 labels.

  python -m data_prep.datasets --name=lf_amazontitles_1p3m --out=raw/LF-AmazonTitles-1.3M
  vixml prepare --raw=raw/LF-AmazonTitles-1.3M --out=data/lf_amazontitles_1p3m --name=lf_amazontitles_1p3m
  vixml train --config=configs/lf_amazontitles_1p3m.py:backbone=distilbert,images=3 \\
      --workdir=runs/lf_amazontitles_1p3m/distilbert_images=3

Arguments: backbone, images (0 = text only), loss, vision, fusion, prompt, query_prompt, pooling, rae, epochs,
seed, smoke; their values and the recipes are in vixml_jax/recipes.py. `vixml tables` prints the command of
every row of the paper. Published, percent:

                text                        images=3
  backbone        P@1    P@5  PSP@1  R@100     P@1    P@5  PSP@1  R@100
  MiniLM-L3     51.59  39.28  29.50  58.44   60.36  45.78  34.88  67.35
  DistilBERT    58.49  45.27  33.28  63.76   64.17  49.43  36.58  70.65
  BERT          59.10  45.62  34.10  64.30   64.59  49.66  37.35  71.08
  Qwen2.5-0.5B  58.02  45.11  31.68  63.96   63.57  49.08  35.21  70.35
  Qwen2.5-3B    60.74  47.39  34.01  66.88   66.01  51.21  37.71  73.13
"""

from ml_collections import ConfigDict

from vixml_jax import recipes


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config for the argument, as in "backbone=qwen2.5-3b,images=3,loss=prime"."""
    return recipes.get_config("lf_amazontitles_1p3m", arg)
