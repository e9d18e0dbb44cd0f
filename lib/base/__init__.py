"""The base model, its tokenizer, and the records it learns from (notebook 01)."""

from lib import exports

__getattr__, __all__ = exports(__name__, {
    "model": "MODULE_KINDS best_dtype load_model load_tokenizer release_memory",
    "embedded": "EMBEDDED locate",
    "records": "DATA movies read_jsonl sensors",
    "prompts": "IGNORED encode pad_right render",
    "four_bit": "frozen_weight quantized_config",
})
