"""The tables of the ViXML paper (arXiv 2511.13189), row by row: a config's arguments, and what was published.

`vixml tables` reads this file. Figures are percent. A row without a config is another method's, or one that
cannot be run here; its figures are those that its authors published, or that the paper gives for it.
"""

from __future__ import annotations

import dataclasses

from vixml_jax.tables import Row, Table

TITLES_131K, FULL_131K = "lf_amazontitles_131k", "lf_amazon_131k"
MM_300K, TITLES_1P3M = "mm_amazontitles_300k", "lf_amazontitles_1p3m"

MAIN = ("P@1", "P@5", "PSP@1", "R@100")


def row(name: str, dataset: str, args: str, *figures: float | None) -> Row:
    """A row; `args` "" makes it one that is not run here."""
    return Row(name, dataset, args, figures)


def backbones(arguments: str, published: dict[str, dict[str, tuple[float, ...]]]) -> tuple[Row, ...]:
    """A row for each dataset and backbone."""
    return tuple(
        Row(NAMES[backbone], dataset, f"backbone={backbone}{arguments}", figures)
        for dataset, by_backbone in published.items()
        for backbone, figures in by_backbone.items()
    )


NAMES = {
    "minilm-l3": "MiniLM-L3",
    "distilbert": "DistilBERT",
    "bert": "BERT",
    "qwen2.5-0.5b": "Qwen2.5-0.5B",
    "qwen2.5-3b": "Qwen2.5-3B",
    "qwen2.5-7b": "Qwen2.5-7B",
}

TEXT = backbones(
    "",
    {
        TITLES_131K: {
            "minilm-l3": (41.72, 20.16, 36.17, 64.68),
            "distilbert": (44.86, 21.45, 39.62, 68.05),
            "bert": (45.87, 21.88, 40.54, 69.67),
            "qwen2.5-0.5b": (44.84, 21.66, 39.64, 70.30),
            "qwen2.5-3b": (47.42, 22.89, 41.88, 74.34),
            "qwen2.5-7b": (48.06, 23.07, 42.43, 75.24),
        },
        MM_300K: {
            "minilm-l3": (49.54, 31.93, 33.83, 69.30),
            "distilbert": (52.40, 34.29, 36.36, 72.59),
            "bert": (52.95, 34.57, 36.85, 73.34),
            "qwen2.5-0.5b": (52.30, 34.23, 36.22, 74.44),
            "qwen2.5-3b": (54.71, 35.93, 36.29, 77.22),
        },
        TITLES_1P3M: {
            "minilm-l3": (51.59, 39.28, 29.50, 58.44),
            "distilbert": (58.49, 45.27, 33.28, 63.76),
            "bert": (59.10, 45.62, 34.10, 64.30),
            "qwen2.5-0.5b": (58.02, 45.11, 31.68, 63.96),
            "qwen2.5-3b": (60.74, 47.39, 34.01, 66.88),
        },
        FULL_131K: {
            "minilm-l3": (41.99, 20.42, 35.44, 68.37),
            "distilbert": (47.98, 23.21, 40.99, 76.22),
            "bert": (49.15, 23.71, 42.18, 78.94),
            "qwen2.5-0.5b": (49.23, 23.99, 42.40, 81.24),
            "qwen2.5-3b": (53.17, 25.72, 45.74, 85.61),
        },
    },
)

VIXML = backbones(
    ",images=3",
    {
        TITLES_131K: {
            "minilm-l3": (47.18, 22.69, 41.01, 73.81),
            "distilbert": (49.55, 23.73, 43.78, 76.73),
            "bert": (50.50, 24.08, 44.67, 78.43),
            "qwen2.5-0.5b": (50.27, 24.22, 44.31, 79.41),
            "qwen2.5-3b": (52.47, 25.26, 46.46, 82.21),
            "qwen2.5-7b": (52.75, 25.37, 46.70, 83.27),
        },
        MM_300K: {
            "minilm-l3": (52.97, 34.13, 35.51, 73.08),
            "distilbert": (55.03, 35.91, 37.52, 76.07),
            "bert": (55.59, 36.10, 37.83, 76.67),
            "qwen2.5-0.5b": (55.28, 36.09, 36.48, 77.61),
            "qwen2.5-3b": (56.55, 37.04, 37.60, 79.38),
        },
        TITLES_1P3M: {
            "minilm-l3": (60.36, 45.78, 34.88, 67.35),
            "distilbert": (64.17, 49.43, 36.58, 70.65),
            "bert": (64.59, 49.66, 37.35, 71.08),
            "qwen2.5-0.5b": (63.57, 49.08, 35.21, 70.35),
            "qwen2.5-3b": (66.01, 51.21, 37.71, 73.13),
        },
        FULL_131K: {
            "minilm-l3": (46.88, 22.63, 39.97, 75.80),
            "distilbert": (51.30, 24.69, 44.09, 81.40),
            "bert": (52.28, 25.12, 45.08, 83.40),
            "qwen2.5-0.5b": (51.76, 25.05, 45.08, 84.52),
            "qwen2.5-3b": (55.11, 26.46, 47.73, 87.73),
        },
    },
)

# Mean pooling, no training. The paper trains the same towers with its own prompt.
OTHER_MODELS = (
    row("MoCa-Qwen25VL-3B, off the shelf, pictures too", TITLES_131K, "", 25.67),  # no tower of its kind here
    row(
        "Qwen3-Embedding-4B, off the shelf",
        TITLES_131K,
        "backbone=qwen3-embedding-4b,prompt=bare,epochs=0",
        22.33,
    ),
    row(
        "Qwen3-Embedding-4B, instructed, last token",
        TITLES_131K,
        "backbone=qwen3-embedding-4b,prompt=bare,query_prompt=instruct,pooling=last,epochs=0",
        18.33,
    ),
    row("Qwen2.5-3B", TITLES_131K, "backbone=qwen2.5-3b", 47.42),
    row("Llama-3.2-3B", TITLES_131K, "backbone=llama-3.2-3b", 48.19),
    row("Qwen3-4B", TITLES_131K, "backbone=qwen3-4b", 47.24),
    row("Qwen3-Embedding-4B", TITLES_131K, "backbone=qwen3-embedding-4b", 47.51),
    row("Gemma-3-4B", TITLES_131K, "backbone=gemma-3-4b", 47.74),
)

FUSION = (
    row("MUFIN as published", MM_300K, "", 52.30, 34.76, 50.63),
    row("late, ViT", MM_300K, "backbone=distilbert,images=3,vision=vit,fusion=late", 52.62, 34.35, 49.28),
    row("late, SigLIP2", MM_300K, "backbone=distilbert,images=3,fusion=late", 53.44, 34.79, 50.18),
    row("early, ViT", MM_300K, "backbone=distilbert,images=3,vision=vit", 53.30, 34.80, 50.19),
    row("early, SigLIP2", MM_300K, "backbone=distilbert,images=3", 55.03, 35.91, 51.98),
)

METHODS = (
    row("NGAME, text", TITLES_131K, "backbone=distilbert,loss=ngame", 42.47, 20.44, 37.95, 65.43),
    row("DEXA, text", TITLES_131K, "backbone=distilbert,loss=dexa", 44.38, 20.96, 38.64, 65.37),
    row("PRIME, text", TITLES_131K, "backbone=distilbert", 44.86, 21.45, 39.62, 68.05),
    row("NGAME, images", TITLES_131K, "backbone=distilbert,images=3,loss=ngame", 47.81, 22.79, 43.04, 74.09),
    row("DEXA, images", TITLES_131K, "backbone=distilbert,images=3,loss=dexa", 49.48, 23.19, 43.21, 73.57),
    row("PRIME, images", TITLES_131K, "backbone=distilbert,images=3", 49.55, 23.73, 43.78, 76.73),
)

# E text, V pictures; T1 "This product text", T2 "and its text", I1 "This product image", I2 "and its image".
PROMPTS = tuple(
    row(
        name,
        TITLES_131K,
        f"backbone=qwen2.5-0.5b{',images=3' if 'V' in name else ''},"
        f"prompt={name.lower().replace(' ', '')},epochs=20",
        figure,
    )
    for name, figure in (
        ("E", 43.14),
        ("T1 + E", 44.15),
        ("T1 + E + EOS", 44.66),
        ("V + E + EOS", 46.12),
        ("E + V + EOS", 49.45),
        ("I1 + V + T2 + E + EOS", 49.29),
        ("T1 + E + I2 + V + EOS", 49.67),
    )
)

BEST = (
    row("ViXML, Qwen2.5-7B", TITLES_131K, "backbone=qwen2.5-7b,images=3,rae", 53.08, 25.74, 46.22),
    row("ViXML, Qwen2.5-3B", MM_300K, "backbone=qwen2.5-3b,images=3,rae", 57.37, 38.08, 36.12),
    row("ViXML, Qwen2.5-3B", TITLES_1P3M, "backbone=qwen2.5-3b,images=3,rae", 67.83, 53.72, 35.40),
    row("ViXML, Qwen2.5-3B", FULL_131K, "backbone=qwen2.5-3b,images=3,rae", 55.57, 26.84, 47.41),
)
# As their papers and the XML repository's page give them; None where there is no such figure.
PEERS = (
    row("NGAME", TITLES_131K, "", 46.01, 21.47, 38.81),
    row("DEXA", TITLES_131K, "", 46.42, 21.59, 39.11),
    row("Renee", TITLES_131K, "", 46.05, 22.04, 39.08),
    row("SiameseXML", TITLES_131K, "", 41.42, 21.21, 35.80),
    row("XR-Transformer", TITLES_131K, "", 38.10, 18.32, 28.86),
    row("ECLARE", TITLES_131K, "", 40.74, 19.88, 33.51),
    row("LightXML", TITLES_131K, "", 35.60, 17.45, 25.67),
    row("DEXML", TITLES_131K, "", 42.52, 20.64, None),
    row("PRIME", TITLES_131K, "", 45.26, 21.48, 39.29),
    row("UniDEC", TITLES_131K, "", 44.35, 21.03, 39.23),
    row("OAK", TITLES_131K, "", 46.42, 21.88, 39.76),
    row("MOGIC", TITLES_131K, "", 47.01, 22.40, 40.62),
    row("MUFIN", MM_300K, "", 52.30, 34.76, None),
    row("NGAME", TITLES_1P3M, "", 56.75, 44.09, 29.18),
    row("DEXA", TITLES_1P3M, "", 56.63, 43.90, 29.12),
    row("Renee", TITLES_1P3M, "", 56.04, 45.32, 28.54),
    row("SiameseXML", TITLES_1P3M, "", 49.02, 38.52, 27.12),
    row("XR-Transformer", TITLES_1P3M, "", 50.14, 39.98, 20.06),
    row("ECLARE", TITLES_1P3M, "", 50.14, 40.00, 23.43),
    row("DEXML", TITLES_1P3M, "", 58.40, 45.46, 31.36),
    row("PRIME", TITLES_1P3M, "", 59.62, 46.75, 31.20),
    row("UniDEC", TITLES_1P3M, "", 57.41, 45.89, 30.10),
    row("OAK", TITLES_1P3M, "", 49.46, 38.61, 34.92),
    row("MOGIC", TITLES_1P3M, "", 50.95, 39.95, 36.28),
    row("NGAME", FULL_131K, "", 46.53, 22.02, 38.53),
    row("DEXA", FULL_131K, "", 47.16, 22.42, 38.70),
    row("Renee", FULL_131K, "", 48.05, 23.26, 40.11),
    row("SiameseXML", FULL_131K, "", 44.81, 21.94, 37.56),
    row("XR-Transformer", FULL_131K, "", 45.61, 22.32, 34.93),
    row("ECLARE", FULL_131K, "", 43.56, 21.57, 34.98),
    row("LightXML", FULL_131K, "", 41.49, 20.75, 30.27),
    row("PRIME", FULL_131K, "", 48.20, 23.28, 40.16),
    row("UniDEC", FULL_131K, "", 47.80, 23.35, 40.28),
    row("OAK", FULL_131K, "", 48.36, 22.20, None),
    row("MOGIC", FULL_131K, "", 50.05, 23.72, None),
    row("PINA", FULL_131K, "", 46.76, 23.20, None),
)

IMAGES = tuple(
    row(name, MM_300K, f"backbone=distilbert{argument}", figure)
    for name, argument, figure in (
        ("text only", "", 52.40),
        ("1 image", ",images=1", 54.51),
        ("2 images", ",images=2", 54.80),
        ("3 images", ",images=3", 55.03),
        ("5 images", ",images=5", 55.10),
    )
)

THREE_B = "backbone=qwen2.5-3b"
WORDING = (
    row("This product text [text]", TITLES_131K, THREE_B, 47.42),
    row("This sentence text [text]", TITLES_131K, f"{THREE_B},prompt=sentence", 47.39),
    row("This product text [text] means in one word:", TITLES_131K, f"{THREE_B},prompt=one-word", 47.45),
    row("the same, last-token pooling", TITLES_131K, f"{THREE_B},prompt=one-word,pooling=last", 47.07),
    row("The description of a product is: [text]", TITLES_131K, f"{THREE_B},prompt=description", 47.44),
)

SEEDS = tuple(
    row(f"seed {seed}", TITLES_131K, f"backbone=qwen2.5-0.5b,seed={seed}", figure)
    for seed, figure in enumerate((44.84, 44.84, 44.71, 45.03, 44.88), start=1)
)


def augmented(model: str, args: str, published: dict[str, tuple[float, ...]]) -> tuple[Row, ...]:
    """Rows with retrieval augmentation; a decoder is the 7B on 131K titles, else the 3B."""
    decoder = {TITLES_131K: "qwen2.5-7b"}
    return tuple(
        Row(
            f"{NAMES[decoder.get(dataset, 'qwen2.5-3b') if model == 'decoder' else model]}"
            f"{' ViXML' if 'images' in args else ', text'}",
            dataset,
            f"backbone={decoder.get(dataset, 'qwen2.5-3b') if model == 'decoder' else model}{args},rae",
            figures,
        )
        for dataset, figures in published.items()
    )


AUGMENTED = (
    *augmented(
        "distilbert",
        "",
        {
            TITLES_131K: (45.29, 21.89, 39.24, 69.40),
            FULL_131K: (48.46, 23.74, 40.77, 77.67),
            MM_300K: (53.94, 36.16, 34.45, 76.79),
            TITLES_1P3M: (60.98, 48.18, 28.99, 68.16),
        },
    ),
    *augmented(
        "distilbert",
        ",images=3",
        {
            TITLES_131K: (50.02, 24.24, 43.47, 77.89),
            FULL_131K: (51.85, 25.20, 43.94, 82.56),
            MM_300K: (56.37, 37.54, 35.65, 79.50),
            TITLES_1P3M: (66.53, 52.36, 33.09, 75.08),
        },
    ),
    *augmented(
        "decoder",
        "",
        {
            TITLES_131K: (48.41, 23.39, 41.69, 75.89),
            FULL_131K: (53.68, 26.14, 45.53, 86.17),
            MM_300K: (55.48, 37.00, 34.74, 78.93),
            TITLES_1P3M: (62.84, 49.76, 31.11, 70.24),
        },
    ),
    *augmented(
        "decoder",
        ",images=3",
        {
            TITLES_131K: (53.08, 25.74, 46.22, 83.88),
            FULL_131K: (55.57, 26.84, 47.41, 88.22),
            MM_300K: (57.37, 38.08, 36.12, 80.85),
            TITLES_1P3M: (67.83, 53.72, 35.40, 76.76),
        },
    ),
)

TABLES = {
    1: Table("Backbones, text only", MAIN, TEXT),
    2: Table("Other language models, text only", ("P@1",), OTHER_MODELS),
    3: Table("Backbones with three images (ViXML)", MAIN, VIXML),
    4: Table("Fusion of text and images, DistilBERT", ("P@1", "P@5", "R@10"), FUSION),
    5: Table("Methods, DistilBERT", MAIN, METHODS),
    6: Table("Prompts, Qwen2.5-0.5B, 20 epochs", ("P@1",), PROMPTS),
    7: Table("Best models with retrieval augmentation, and their peers", MAIN[:3], (*BEST, *PEERS)),
    10: Table("Number of images, DistilBERT", ("P@1",), IMAGES),
    11: Table("Wording of the prompt, Qwen2.5-3B, text only", ("P@1",), WORDING),
    12: Table("Seeds, Qwen2.5-0.5B, text only", ("P@1",), SEEDS),
    13: Table("Retrieval augmentation", MAIN, AUGMENTED),
}
# The supplement's comparison; its rows of ours are those of Table 7.
TABLES[14] = dataclasses.replace(TABLES[7], title="Best models with retrieval augmentation (supplement)")
