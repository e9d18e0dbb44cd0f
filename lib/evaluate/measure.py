"""Peak memory of a block."""

import contextlib
import threading
from collections.abc import Iterator

import psutil
import torch


@contextlib.contextmanager
def peak_memory(interval: float = 0.05, *, children: bool = False) -> Iterator[dict[str, float]]:
    """Peak memory, {"mb": 10^6 bytes}, of this process, or of its `children`, in the block.

    Allocated memory on a GPU, exact; else resident memory, sampled every `interval` seconds.
    """
    peak, stop = {"mb": 0.0}, threading.Event()
    process, on_gpu = psutil.Process(), torch.cuda.is_available() and not children

    def watch() -> None:
        ended = False
        while not ended:
            total = 0
            for one in process.children(recursive=True) if children else [process]:
                with contextlib.suppress(psutil.Error):  # it may have ended meanwhile
                    total += one.memory_info().rss
            peak["mb"] = max(peak["mb"], total / 1e6)
            ended = stop.wait(interval)

    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()
        if on_gpu:
            peak["mb"] = torch.cuda.max_memory_allocated() / 1e6
