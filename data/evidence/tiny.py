"""A model small enough for tests and for measurements of everything but its weights."""

import transformers


def tiny_model(layers: int = 2, *, vocabulary: int = 49152) -> transformers.LlamaForCausalLM:
    """Random Llama with the embedded model's proportions."""
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=1,
        eos_token_id=2, pad_token_id=0, attn_implementation="eager")).eval()
