"""A matrix product in float32 and in bfloat16: what the choice of the dtype rests on."""

from typing import Any

import torch

from lib.base.model import best_dtype, product_seconds


def dtypes() -> dict[str, Any]:
    """Both times in ms, their ratio, and what models are loaded in here."""
    seconds = product_seconds()
    plain, half = seconds[torch.float32], seconds[torch.bfloat16]
    return {"instructions": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(), "float32_ms": 1e3 * plain,
            "bfloat16_ms": 1e3 * half, "bfloat16_over_float32": half / plain,
            "chosen": str(best_dtype()).removeprefix("torch.")}
