"""What the tests of the towers share: a fresh seed, and tiny PyTorch models written to disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

_SHAPE = {"vocab_size": 99, "max_position_embeddings": 24}
MODELS = {
    "bert": lambda: transformers.BertModel(
        transformers.BertConfig(
            **_SHAPE, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128
        )
    ),
    "bert_masked_lm": lambda: transformers.BertForMaskedLM(
        transformers.BertConfig(
            **_SHAPE, hidden_size=64, num_hidden_layers=2, num_attention_heads=8, intermediate_size=96
        )
    ),
    "distilbert": lambda: transformers.DistilBertModel(
        transformers.DistilBertConfig(**_SHAPE, dim=64, n_layers=3, n_heads=4, hidden_dim=128)
    ),
    "vit": lambda: transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=96,
            image_size=32,
            patch_size=8,
        )
    ),
}


@pytest.fixture
def seed() -> int:
    """A fresh seed, shown when the test fails."""
    value = int(np.random.SeedSequence().entropy % 2**31)  # pyright: ignore[reportOperatorIssue]
    print(f"seed {value}")
    torch.manual_seed(value)
    return value


@pytest.fixture
def torch_model(seed, tmp_path):
    """Returns a function: name of MODELS -> (PyTorch model with lively weights, its directory)."""

    def make(name: str, **save_options) -> tuple[torch.nn.Module, Path]:
        model = MODELS[name]().eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                noise = torch.randn_like(parameter)
                # Norm scales stay near one; everything else, biases too, is far from its starting value.
                is_scale = parameter.ndim == 1 and key.endswith("weight")
                parameter.copy_(1 + 0.2 * noise if is_scale else 0.15 * noise)
        model.save_pretrained(tmp_path / name, **save_options)
        return model, tmp_path / name

    return make
