"""LF-Amazon-131K: titles and descriptions of products, 131,073 labels.

  python -m data_prep.datasets --name=lf_amazon_131k --out=raw/LF-Amazon-131K
  vixml prepare --raw=raw/LF-Amazon-131K --out=data/lf_amazon_131k --name=lf_amazon_131k
  vixml train --config=configs/lf_amazon_131k.py:backbone=distilbert,images=3 \\
      --workdir=runs/lf_amazon_131k/distilbert_images=3

Arguments: backbone, images (0 = text only), loss, vision, fusion, prompt, query_prompt, pooling, rae, epochs,
seed, smoke; their values and the recipes are in vixml_jax/recipes.py. `vixml tables` prints the command of
every row of the paper. Published, percent:

                text                        images=3
  backbone        P@1    P@5  PSP@1  R@100     P@1    P@5  PSP@1  R@100
  MiniLM-L3     41.99  20.42  35.44  68.37   46.88  22.63  39.97  75.80
  DistilBERT    47.98  23.21  40.99  76.22   51.30  24.69  44.09  81.40
  BERT          49.15  23.71  42.18  78.94   52.28  25.12  45.08  83.40
  Qwen2.5-0.5B  49.23  23.99  42.40  81.24   51.76  25.05  45.08  84.52
  Qwen2.5-3B    53.17  25.72  45.74  85.61   55.11  26.46  47.73  87.73
"""

from ml_collections import ConfigDict

from vixml_jax import recipes


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config for the argument, as in "backbone=qwen2.5-3b,images=3,loss=prime"."""
    return recipes.get_config("lf_amazon_131k", arg)
