"""MM-AmazonTitles-300K: titles and pictures of products, 303,296 labels.

  python -m data_prep.datasets --name=mm_amazontitles_300k --out=raw/MM-AmazonTitles-300K
  vixml prepare --raw=raw/MM-AmazonTitles-300K --out=data/mm_amazontitles_300k --name=mm_amazontitles_300k
  vixml train --config=configs/mm_amazontitles_300k.py:backbone=distilbert,images=3 \\
      --workdir=runs/mm_amazontitles_300k/distilbert_images=3

Arguments: backbone, images (0 = text only), loss, vision, fusion, prompt, query_prompt, pooling, rae, epochs,
seed, smoke; their values and the recipes are in vixml_jax/recipes.py. `vixml tables` prints the command of
every row of the paper. Published, percent:

                text                        images=3
  backbone        P@1    P@5  PSP@1  R@100     P@1    P@5  PSP@1  R@100
  MiniLM-L3     49.54  31.93  33.83  69.30   52.97  34.13  35.51  73.08
  DistilBERT    52.40  34.29  36.36  72.59   55.03  35.91  37.52  76.07
  BERT          52.95  34.57  36.85  73.34   55.59  36.10  37.83  76.67
  Qwen2.5-0.5B  52.30  34.23  36.22  74.44   55.28  36.09  36.48  77.61
  Qwen2.5-3B    54.71  35.93  36.29  77.22   56.55  37.04  37.60  79.38
"""

from ml_collections import ConfigDict

from vixml_jax import recipes


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config for the argument, as in "backbone=qwen2.5-3b,images=3,loss=prime"."""
    return recipes.get_config("mm_amazontitles_300k", arg)
