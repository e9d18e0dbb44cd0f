"""From records to an adapter: LoRA, QLoRA, full fine-tuning (notebooks 01 and 02)."""

from lib import exports

__getattr__, __all__ = exports(__name__, {"training": "base_for train", "lora": (
    "adapter_factors adapter_files count_adapter count_trainable delta_weight fused "
    "linear_shapes load_adapter lora_config make_portable settled")})
