"""Several processes that train one model, started by `accelerate launch`.

The trainer deals out the batches and averages the gradients. Here is what else
they must agree on: who writes and speaks, in which dtype they compute, and
whether each holds whole weights (DDP) or parts of them (FSDP). One process
alone is the first of one.
"""

import os

import torch
from accelerate import PartialState
from accelerate.utils import broadcast

from lib.base_model import best_dtype
from lib.errors import require


def count() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def first() -> bool:
    """This is the process that writes files and prints."""
    return count() == 1 or os.environ.get("RANK") == "0"


def sharded() -> bool:
    """FSDP is on: no process holds the whole model."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def join() -> PartialState:
    """Meet the other processes; from here on all compute in the first one's dtype.

    `best_dtype` times two products. Two processes on one machine may find
    different winners, and their gradients would not add up.
    """
    state = PartialState(cpu=not torch.cuda.is_available())
    require(state.num_processes == count(), f"WORLD_SIZE is {count()}, but "
            f"{state.num_processes} came together: start them with `accelerate launch`")
    if state.num_processes > 1:
        wide = broadcast(torch.tensor(int(best_dtype() == torch.float32), device=state.device))
        os.environ["COURSE_DTYPE"] = "float32" if wide else "bfloat16"
        best_dtype.cache_clear()
    return state
