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
_DECODER = {**_SHAPE, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
_THETA = {"rope_theta": 500.0}  # short wavelengths, so that a few positions tell them apart
_GEMMA = {
    **_DECODER,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 2.5, **_THETA},
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    },
}
_TEXT_SIDE = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{**_SHAPE, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
_LAYERS = {"num_hidden_layers": 2, "intermediate_size": 80}
_SIDE = {**_LAYERS, "hidden_size": 64, "num_attention_heads": 4, "image_size": 24, "patch_size": 8}
# An odd number of heads, and two pixels that no patch covers.
_ODD_SIDE = {**_LAYERS, "hidden_size": 48, "num_attention_heads": 3, "image_size": 23, "patch_size": 7}
_NAFLEX_SIDE = {**_LAYERS, "hidden_size": 48, "num_attention_heads": 4, "patch_size": 5, "num_patches": 9}
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
    "qwen2": lambda: transformers.Qwen2Model(
        transformers.Qwen2Config(
            **_DECODER, num_attention_heads=4, num_key_value_heads=2, rope_parameters={**_THETA}
        )
    ),
    # An odd number of heads, one key for all; an LM head of its own; the upper layer has a window.
    "qwen2_untied": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            **_DECODER,
            num_attention_heads=3,
            num_key_value_heads=1,
            use_sliding_window=True,
            sliding_window=3,
            max_window_layers=1,
        )
    ),
    # Heads that are wider together than the model; the LM head is the token table.
    "qwen3": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            **_DECODER,
            num_attention_heads=6,
            num_key_value_heads=3,
            head_dim=20,
            tie_word_embeddings=True,
        )
    ),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **_DECODER,
            num_attention_heads=6,
            num_key_value_heads=2,
            attention_bias=True,
            mlp_bias=True,
            rms_norm_eps=1e-5,
            rope_parameters={
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
                **_THETA,
            },
        )
    ),
    "gemma3_text": lambda: transformers.Gemma3TextModel(transformers.Gemma3TextConfig(**_GEMMA)),
    # The same within a model that sees.
    "gemma3": lambda: transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            text_config={**_GEMMA, "model_type": "gemma3_text"},
            vision_config={
                "model_type": "siglip_vision_model",
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 8,
            },
            mm_tokens_per_image=4,
            image_token_index=98,
        )
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
    "vit_classifier": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(**_ODD_SIDE, qkv_bias=False, hidden_act="relu")
    ),
    "siglip": lambda: transformers.SiglipModel(
        transformers.SiglipConfig(vision_config=_SIDE, text_config=_TEXT_SIDE)
    ),
    "siglip_alone": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**_ODD_SIDE)),
    # NaFlex, whose native square is 3 x 3 patches.
    "siglip2": lambda: transformers.Siglip2Model(
        transformers.Siglip2Config(vision_config=_NAFLEX_SIDE, text_config=_TEXT_SIDE)
    ),
    "siglip2_alone": lambda: transformers.Siglip2VisionModel(
        transformers.Siglip2VisionConfig(**{**_NAFLEX_SIDE, "num_attention_heads": 1})
    ),
    "clip": lambda: transformers.CLIPModel(
        transformers.CLIPConfig(vision_config=_SIDE, text_config=_TEXT_SIDE)
    ),
    "clip_alone": lambda: transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(**_ODD_SIDE, hidden_act="gelu", projection_dim=20)
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
                # Norm scales stay near where they start; everything else, biases too, is far from it.
                is_scale = parameter.ndim == 1 and key.endswith("weight")
                parameter.copy_(parameter + 0.2 * noise if is_scale else 0.15 * noise)
        model.save_pretrained(tmp_path / name, **save_options)
        return model, tmp_path / name

    return make
