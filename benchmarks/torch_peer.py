"""The peer: the same model and loss in eager PyTorch, built of `transformers` towers, one item a row, padded.

It is what the public training scripts of this field do: queries and labels are padded to the longest of the
batch, each side by itself, and go through `AutoModel` in two calls.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers

from vixml_jax import files
from vixml_jax.export import tower_tensors, write_weights
from vixml_jax.models import hf_names
from vixml_jax.models.dual_encoder import DualEncoder
from vixml_jax.types import Batch, PackedTokens

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Padded:
    """N items, one a row, padded on the right to the longest.

    Attributes:
      token_ids: int64 [N, T].
      mask: bool [N, T].
      image_index: int64 [N, T]; row of `images`, -1 for a text slot; None for text only.
      images: float [M, V].
    """

    token_ids: torch.Tensor
    mask: torch.Tensor
    image_index: torch.Tensor | None = None
    images: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class PeerBatch:
    """A batch of the peer: both sides padded, targets, and what the prototypes need of each label slot."""

    queries: Padded
    labels: Padded
    targets_QL: torch.Tensor
    clusters_L: torch.Tensor
    centroids_LD: torch.Tensor

    @property
    def padding(self) -> float:
        """Share of slots that hold nothing."""
        masks = (self.queries.mask, self.labels.mask)
        return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def unpack(tokens: PackedTokens, items: range, device: str) -> Padded:
    """Takes items out of packed rows: the peer reads exactly what the packed rows hold."""
    item_RT, token_RT = np.asarray(tokens.item_index), np.asarray(tokens.token_ids)
    chosen = (item_RT >= items.start) & (item_RT < items.stop)
    rows, columns = item_RT[chosen] - items.start, np.asarray(tokens.positions)[chosen]
    shape = (len(items), int(columns.max()) + 1)
    token_ids, mask = np.zeros(shape, np.int64), np.zeros(shape, bool)
    token_ids[rows, columns], mask[rows, columns] = token_RT[chosen], True
    image_index = images = None
    if tokens.images is not None and tokens.image_index is not None:
        index = np.full(shape, -1, np.int64)
        index[rows, columns] = np.asarray(tokens.image_index)[chosen]
        image_index = torch.from_numpy(index).to(device)
        images = torch.from_numpy(np.asarray(tokens.images, np.float32)).to(device)
    return Padded(
        torch.from_numpy(token_ids).to(device), torch.from_numpy(mask).to(device), image_index, images
    )


def peer_batch(batch: Batch, clusters: np.ndarray, centroids: np.ndarray, device: str) -> PeerBatch:
    """The same batch as the packed one; `clusters` [L] and `centroids` [L, D] are the run's tables."""
    size = len(batch.query_rows)
    label_ids = np.asarray(batch.label_ids)
    return PeerBatch(
        unpack(batch.tokens, range(size), device),
        unpack(batch.tokens, range(size, 2 * size), device),
        torch.from_numpy(np.asarray(batch.targets) > 0).to(device),
        torch.from_numpy(clusters[label_ids].astype(np.int64)).to(device),
        torch.from_numpy(centroids[label_ids]).to(device),
    )


class Peer(torch.nn.Module):
    """The tower, PRIME's head and the free vectors, with the weights of a DualEncoder.

    Args:
      model: where the weights come from.
      directory: empty; takes the tower as a Hugging Face directory, which `transformers` loads.
      dtype: of the computation; parameters that train are float32 under autocast.
      lora_rank: adapters by PEFT in place of full training; 0 for none.
      checkpointing: whether layers are computed again in the backward pass.
      device: "cpu" or "cuda".
    """

    def __init__(
        self,
        model: DualEncoder,
        directory: Path,
        *,
        dtype: str = "float32",
        lora_rank: int = 0,
        checkpointing: bool = False,
        device: str = "cpu",
    ):
        super().__init__()
        self.dtype, self.device = DTYPES[dtype], device
        tower: Any = model.tower.text
        family = hf_names.TEXT_FAMILIES[tower.config.family]
        files.write_json(directory / "config.json", {**family.write_config(tower.config), "dtype": "float32"})
        write_weights(directory, tower_tensors(tower, family.entries(tower.config)), "float32", 1 << 40)
        stored = dtype if lora_rank else "float32"
        no_pooler = {"add_pooling_layer": False} if tower.config.family == "bert" else {}
        self.tower: Any = transformers.AutoModel.from_pretrained(directory, dtype=DTYPES[stored], **no_pooler)
        self.tower.train()
        for module in self.tower.modules():  # the towers of ViXML are trained without dropout
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        for name in ("attention_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob"):
            if hasattr(self.tower.config, name):
                setattr(self.tower.config, name, 0.0)
        self.embed_tokens = self.tower.get_input_embeddings()
        if lora_rank:
            self.tower = _with_lora(self.tower, lora_rank)
        if checkpointing:
            self.tower.gradient_checkpointing_enable({"use_reentrant": False})
            self.tower.enable_input_require_grads()
        self.projection = _linear(model.tower.image_projection)
        assert model.free_vectors is not None  # the benchmark's config has them
        assert model.head is not None
        self.vectors = torch.nn.Parameter(_tensor(model.free_vectors))
        self.head = _prime_head(model.head)
        self.to(device)

    def pooled(self, items: Padded) -> torch.Tensor:
        """Mean of the last hidden states of each item, float32 [N, D]."""
        mask = items.mask
        inputs: dict[str, torch.Tensor] = {"attention_mask": mask.long()}
        if items.image_index is None or items.images is None or self.projection is None:
            inputs["input_ids"] = items.token_ids
        else:
            slots = self.projection(items.images)[items.image_index.clamp(min=0)]
            words = self.embed_tokens(items.token_ids)
            inputs["inputs_embeds"] = torch.where(items.image_index[..., None] >= 0, slots, words)
        hidden = self.tower(**inputs).last_hidden_state.float()
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def forward(self, batch: PeerBatch, temperature: float) -> torch.Tensor:
        """DEXML's decoupled softmax on prototypes: scalar."""
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            queries_QD = F.normalize(self.pooled(batch.queries), dim=-1)
            texts_LD = self.pooled(batch.labels)
        parts = (texts_LD, self.vectors[batch.clusters_L], batch.centroids_LD)
        prototypes_LD = F.normalize(self.head(torch.stack(parts, 1)).mean(1), dim=-1)
        logits_QL = queries_QD @ prototypes_LD.T / temperature
        positive_QL = batch.targets_QL
        negatives_Q1 = logits_QL.masked_fill(positive_QL, -torch.inf).logsumexp(1, keepdim=True)
        losses_QL = F.softplus(negatives_Q1 - logits_QL) * positive_QL
        return (losses_QL.sum(1) / positive_QL.sum(1).clamp(min=1)).mean()


def adamw(peer: Peer, lr: float, head_lr: float, weight_decay: float, eps: float) -> torch.optim.AdamW:
    """The recipe's groups: own learning rates, decay on matrices alone. Fused, PyTorch's fastest AdamW."""
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in peer.named_parameters():
        if parameter.requires_grad:
            decayed = parameter.ndim > 1 and name != "vectors"
            key = (lr if name.startswith("tower") else head_lr, weight_decay if decayed else 0.0)
            groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()],
        eps=eps,
        fused=True,
    )


def _with_lora(tower: Any, rank: int) -> Any:
    import peft  # only the decoders' comparison needs it

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=rank, lora_alpha=rank, use_rslora=True, target_modules=targets)
    return peft.get_peft_model(tower, config)


def _prime_head(head: Any) -> torch.nn.TransformerEncoderLayer:
    dim, hidden = head.mlp.up_proj.kernel[...].shape
    layer = torch.nn.TransformerEncoderLayer(
        dim, head.heads, hidden, dropout=0.0, activation="gelu", batch_first=True
    )
    projections = (head.q_proj, head.k_proj, head.v_proj)
    values = {
        "self_attn.in_proj_weight": torch.cat([_tensor(each.kernel).T for each in projections]),
        "self_attn.in_proj_bias": torch.cat([_tensor(each.bias) for each in projections]),
    }
    linears = (
        ("self_attn.out_proj", head.o_proj),
        ("linear1", head.mlp.up_proj),
        ("linear2", head.mlp.down_proj),
    )
    for name, linear in linears:
        values[f"{name}.weight"], values[f"{name}.bias"] = _tensor(linear.kernel).T, _tensor(linear.bias)
    for name, norm in (("norm1", head.attention_norm), ("norm2", head.mlp_norm)):
        values[f"{name}.weight"], values[f"{name}.bias"] = _tensor(norm.scale), _tensor(norm.bias)
    layer.load_state_dict(values)
    return layer


def _linear(linear: Any) -> torch.nn.Linear | None:
    if linear is None:
        return None
    result = torch.nn.Linear(*linear.kernel[...].shape)
    result.load_state_dict({"weight": _tensor(linear.kernel).T, "bias": _tensor(linear.bias)})
    return result


def _tensor(parameter: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(parameter[...], np.float32))
