"""From weights to fewer bits to files: NormalFloat, merging, INT8, GGUF (notebooks 02 to 04)."""

from lib import exports

__getattr__, __all__ = exports(__name__, {
    "formats": "FORMATS GRID Format dequantize_blocks normal_float quantize_blocks round_trip",
    "merging": "INT8_THRESHOLD ROUTES load_dynamic_int8 load_saved merge save_model "
               "save_quantized", "gguf": "export permute"})
