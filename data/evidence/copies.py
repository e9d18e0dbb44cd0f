"""Copies of a Llama that compute the same function from other numbers.

The embedded base is a dequantised Q4_1, so 4-bit types are judged on their own ground; no copy's
matrix lies on that grid. A copy may also spread a type's error otherwise: compare with Q8_0, which
the grid does not favour.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM


def _readers(layer: nn.Module) -> Iterator[tuple[nn.Module, tuple[nn.Linear, ...]]]:
    """A block's norms, each with the matrices that read what it gives."""
    attention, mlp = layer.self_attn, layer.mlp
    yield layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)
    yield layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)


@torch.no_grad()
def rotated(model: LlamaForCausalLM, seed: int = 0) -> LlamaForCausalLM:
    """The residual stream in another basis, x Q with Q random and orthogonal; in place, float32.

    RMSNorm commutes with Q once its gains are in the matrices that follow, so the head, which has
    its norm's, is no longer the embedding. Weights become more Gaussian, too: columns are mixed.
    """
    generator = torch.Generator().manual_seed(seed)
    width, table = model.config.hidden_size, model.get_input_embeddings()
    turn = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator))[0]

    def reads(weight: Tensor, gain: Tensor) -> Tensor:
        return ((weight.double() * gain.double()) @ turn).float()

    head = reads(model.get_output_embeddings().weight, model.model.norm.weight)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(head, requires_grad=False)
    table.weight.data = (table.weight.double() @ turn).float()
    for layer in model.model.layers:
        for norm, matrices in _readers(layer):
            for matrix in matrices:
                matrix.weight.data = reads(matrix.weight, norm.weight)
            norm.weight.data.fill_(1)
        for matrix in (layer.self_attn.o_proj, layer.mlp.down_proj):
            matrix.weight.data = (turn.T @ matrix.weight.double()).float()
    model.model.norm.weight.data.fill_(1)
    return model


@torch.no_grad()
def shuffled(model: LlamaForCausalLM, seed: int = 0) -> LlamaForCausalLM:
    """The same numbers in other blocks: what a block of a type holds is drawn anew, in place.

    The residual stream, the inside of each MLP and of each attention head are reordered.
    """
    generator = torch.Generator().manual_seed(seed)
    config, table = model.config, model.get_input_embeddings()

    def drawn(count: int) -> Tensor:
        return torch.randperm(count, generator=generator)

    order = drawn(config.hidden_size)
    table.weight.data = table.weight[:, order]
    model.model.norm.weight.data = model.model.norm.weight[order]
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, matrices in _readers(layer):
            norm.weight.data = norm.weight[order]
            for matrix in matrices:
                matrix.weight.data = matrix.weight[:, order]
        inner, head = drawn(config.intermediate_size), drawn(attention.head_dim)
        for matrix in (mlp.gate_proj, mlp.up_proj):
            matrix.weight.data = matrix.weight[inner]
        mlp.down_proj.weight.data = mlp.down_proj.weight[order][:, inner]
        # A head of values, and what reads it, in one order.
        value, out = attention.v_proj.weight, attention.o_proj.weight[order]
        attention.v_proj.weight.data = value.unflatten(0, (-1, len(head)))[:, head].flatten(0, 1)
        attention.o_proj.weight.data = out.unflatten(1, (-1, len(head)))[:, :, head].flatten(1)
    return model


COPIES = {"rotated": rotated, "shuffled": shuffled}
