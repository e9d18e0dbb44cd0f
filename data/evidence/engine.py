"""llama.cpp alone: tensor types, threads, and the settings that might speed up decoding."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xllamacpp

from data.evidence.bench_serving import read_bandwidth, weight_bytes
from data.evidence.pieces import ADAPTERS, WORK
from data.evidence.tiny import tiny_model
from lib.base.embedded import EMBEDDED
from lib.base.records import sensors
from lib.client import question
from lib.quantize.gguf import base_file, write_model
from lib.quantize.merging import merge, save_model


def engine() -> dict[str, Any]:
    """llama.cpp alone: tensor types, threads, and the settings that might speed up decoding."""
    files = {}
    weights = merge(ADAPTERS / "sensors_qlora", route="dequantized")
    for kind in ("F32", "F16", "Q8_0", "Q5_0", "Q4_1", "Q4_0"):
        files[kind] = WORK / "engine" / f"{kind}.gguf"
        with base_file(EMBEDDED, files[kind]) as source:
            write_model(source, files[kind], weights=weights, gguf_type=kind)
    # As many blocks, but so narrow that next to nothing is read. What remains is starting and
    # joining threads, norms, attention and sampling.
    blocks = weights.config.num_hidden_layers
    files["narrow"] = WORK / "engine" / "narrow.gguf"
    save_model(tiny_model(blocks), WORK / "engine" / "narrow")
    with base_file(str(WORK / "engine" / "narrow"), files["narrow"]) as source:
        write_model(source, files["narrow"])
    kinds = xllamacpp.common_speculative_type

    def lookup(params: Any) -> None:
        params.speculative.types = [kinds.COMMON_SPECULATIVE_TYPE_NGRAM_MAP_K]
        params.speculative.ngram_map_k.size_n, params.speculative.ngram_map_k.size_m = 3, 6

    def draft(params: Any) -> None:
        params.speculative.types = [kinds.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
        params.speculative.draft.mparams.path = str(files["Q4_0"])

    settings: dict[str, Any] = {
        "as it is": lambda p: None,
        "flash attention off": lambda p: setattr(
            p, "flash_attn_type",
            xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED),
        "batches of 64": lambda p: setattr(p, "n_ubatch", 64),
        "no repacking": lambda p: setattr(p, "no_extra_bufts", True),
        "guess from the prompt": lookup, "guess by its own Q4_0": draft}
    runs: dict[str, list[dict[str, float]]] = {}
    for _ in range(3):  # in turn, because a shared machine has slow phases
        for name, change in settings.items():
            runs.setdefault(name, []).append(_decode(files["Q8_0"], change))
        for kind, file in files.items():
            for threads in (1, 2):
                runs.setdefault(f"{kind} {threads}", []).append(
                    _decode(file, settings["as it is"], threads))
    middle = {name: {k: statistics.median(r[k] for r in rows) for k in rows[0]}
              for name, rows in runs.items()}
    return {"settings": {name: middle[name] for name in settings},
            "read_bandwidth": read_bandwidth(),
            "types": {kind: {"mb": weight_bytes(file) / 1e6,
                             "threads_1": middle[f"{kind} 1"], "threads_2": middle[f"{kind} 2"]}
                      for kind, file in files.items()}}


def _decode(path: Path, change: Callable[[Any], None], threads: int = 2) -> dict[str, float]:
    """Median decode and prefill tokens a second of the bare engine, 4 answers."""
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.verbosity = str(path), 2048, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    change(params)
    server = xllamacpp.Server(params)
    timings = [server.handle_chat_completions(question(r["instruction"]))["timings"]
               for r in sensors("test", 4)]
    return {"decode": statistics.median(t["predicted_per_second"] for t in timings),
            "prefill": statistics.median(t["prompt_per_second"] for t in timings)}
