"""The base model, its tokenizer, and the records it learns from (notebook 01)."""

from lib import exports

__getattr__, __all__ = exports(__name__, {
    "model": "MODULE_KINDS best_dtype frozen_weight load_model load_tokenizer pad_right "
             "quantized_config release_memory", "embedded": "EMBEDDED locate",
    "records": "DATA IGNORED Records encode movies render sensors"})
