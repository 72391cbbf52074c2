"""LF-AmazonTitles-131K: titles of products, 131,073 labels that are products too.

  python -m data_prep.datasets --name=lf_amazontitles_131k --out=raw/LF-AmazonTitles-131K
  vixml prepare --raw=raw/LF-AmazonTitles-131K --out=data/lf_amazontitles_131k --name=lf_amazontitles_131k
  vixml train --config=configs/lf_amazontitles_131k.py:backbone=distilbert,images=3 \\
      --workdir=runs/lf_amazontitles_131k/distilbert_images=3

Arguments: backbone, images (0 = text only), loss, vision, fusion, prompt, query_prompt, pooling, rae, epochs,
seed, smoke; their values and the recipes are in vixml_jax/recipes.py. `vixml tables` prints the command of
every row of the paper. Published, percent:

                text                        images=3
  backbone        P@1    P@5  PSP@1  R@100     P@1    P@5  PSP@1  R@100
  MiniLM-L3     41.72  20.16  36.17  64.68   47.18  22.69  41.01  73.81
  DistilBERT    44.86  21.45  39.62  68.05   49.55  23.73  43.78  76.73
  BERT          45.87  21.88  40.54  69.67   50.50  24.08  44.67  78.43
  Qwen2.5-0.5B  44.84  21.66  39.64  70.30   50.27  24.22  44.31  79.41
  Qwen2.5-3B    47.42  22.89  41.88  74.34   52.47  25.26  46.46  82.21
  Qwen2.5-7B    48.06  23.07  42.43  75.24   52.75  25.37  46.70  83.27
"""

from ml_collections import ConfigDict

from vixml_jax import recipes


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config for the argument, as in "backbone=qwen2.5-3b,images=3,loss=prime"."""
    return recipes.get_config("lf_amazontitles_131k", arg)
