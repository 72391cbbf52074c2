"""Where the paper's datasets are handed out, and how to cite them.

Addresses are those that the Extreme Classification Repository's page and the code of published methods name;
the tests do not reach them. No checksums are published for the archives.
"""

from __future__ import annotations

import dataclasses

HUB_URL = "https://huggingface.co"
HUB_REPO = "Diegooor/vixml_data"  # the ViXML release: addresses of pictures, SigLIP 2 embeddings
URL_LIST = "img_urls.parquet"
EMBEDDINGS = tuple(f"{split}_embs_imgs_3_1152_siglip2.npy" for split in ("trn", "tst", "lbl"))
MAPS = tuple(f"{split}_imgs_384_3_map.npy" for split in ("train", "test", "labels"))

REPOSITORY = "http://manikvarma.org/downloads/XC/XMLRepository.html"
BHATIA16 = """@Misc{Bhatia16,
  author = {Bhatia, K. and Dahiya, K. and Jain, H. and Kar, P. and Mittal, A. and Prabhu, Y. and Varma, M.},
  title = {The extreme classification repository: Multi-label datasets and code},
  url = {http://manikvarma.org/downloads/XC/XMLRepository.html},
  year = {2016}
}"""
MITTAL22 = """@InProceedings{Mittal22,
  author = {Mittal, A. and Dahiya, K. and Malani, S. and Ramaswamy, J. and Kuruvilla, S. and Ajmera, J. and
            Chang, K. and Agrawal, S. and Kar, P. and Varma, M.},
  title = {Multimodal extreme classification},
  booktitle = {CVPR},
  year = {2022}
}"""
ORTEGO26 = """@InProceedings{Ortego26,
  author = {Ortego, D. and Rodr{\\'i}guez, M. and Almagro, M. and Dahiya, K. and Jim{\\'e}nez, D. and
            SanMiguel, J. C.},
  title = {Large Language Models Meet Extreme Multi-label Classification: Scaling and Multi-modal Framework},
  booktitle = {AAAI},
  year = {2026}
}"""


@dataclasses.dataclass(frozen=True)
class Source:
    """A dataset of the paper.

    Attributes:
      folder: its name in the repository, and of its folders on the hub.
      description: one sentence.
      citation: BibTeX.
      text_url: the archive with texts and labels.
      filters_url: an archive with the filter files, for a text archive that lacks them; "" if it has them.
      hub_folders: folders of the ViXML release with its pictures' addresses and embeddings.
      rows: of train, test and labels, as published.
    """

    folder: str
    description: str
    citation: str
    text_url: str
    filters_url: str
    hub_folders: tuple[str, ...]
    rows: dict[str, int]


def drive(file_id: str) -> str:
    """Address of a file on Google Drive that does not ask back about large files."""
    return f"https://drive.usercontent.google.com/download?id={file_id}&export=download&confirm=t"


def _rows(train: int, test: int, labels: int) -> dict[str, int]:
    return {"train": train, "test": test, "labels": labels}


_PRODUCTS = "Products of a shop, and the products that are bought or viewed with them"
_RAW_131K = drive("1WuquxCAg8D4lKr-eZXPv4nNw2S2lm7_E")
SOURCES = {
    "lf_amazontitles_131k": Source(
        folder="LF-AmazonTitles-131K",
        description=f"{_PRODUCTS}, by their titles.",
        citation=f"{BHATIA16}\n{ORTEGO26}",
        text_url=_RAW_131K,  # one archive has titles and descriptions
        filters_url=drive("1VlfcdJKJA99223fLEawRmrXhXpwjwJKn"),
        hub_folders=("LF-AmazonTitles-131K", "LF-Amazon-131K"),
        rows=_rows(294_805, 134_835, 131_073),
    ),
    "lf_amazon_131k": Source(
        folder="LF-Amazon-131K",
        description=f"{_PRODUCTS}, by their titles and descriptions.",
        citation=f"{BHATIA16}\n{ORTEGO26}",
        text_url=_RAW_131K,
        filters_url=drive("1YNGEifTHu4qWBmCaLEBfjx07qRqw9DVW"),
        hub_folders=("LF-Amazon-131K", "LF-AmazonTitles-131K"),
        rows=_rows(294_805, 134_835, 131_073),
    ),
    "mm_amazontitles_300k": Source(
        folder="MM-AmazonTitles-300K",
        description=f"{_PRODUCTS}, by their titles and pictures.",
        citation=f"{MITTAL22}\n{ORTEGO26}",
        # As an earlier state of MUFIN's page had it; the present one asks to fill in a form.
        text_url=drive("1bV5d_SOw6pNXWrQecihcSc2xkqUcXMFO"),
        filters_url="",
        hub_folders=("MM-AmazonTitles-300K",),
        rows=_rows(586_781, 260_536, 303_296),
    ),
    "lf_amazontitles_1p3m": Source(
        folder="LF-AmazonTitles-1.3M",
        description=f"{_PRODUCTS}, by their titles.",
        citation=f"{BHATIA16}\n{ORTEGO26}",
        text_url=drive("12zH4mL2RX8iSvH0VCNnd3QxO4DzuHWnK"),
        filters_url=drive("1Davc6BIfoTIAS3mP1mUY5EGcGr2zN2pO"),
        hub_folders=("LF-AmazonTitles-1.3M", "LF-Amazon-1.3M"),
        rows=_rows(2_248_619, 970_237, 1_305_265),
    ),
}
