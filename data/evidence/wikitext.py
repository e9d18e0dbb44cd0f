"""Every artifact of the base on WikiText-2, as the field measures them.

Perplexity, the divergence KL(16 bits || artifact) of the next token's distribution in nats, and
the share of equal top tokens, over `COUNT` windows of 512 tokens that do not overlap (stride
512), spread evenly over the test text, without a BOS token: 511 predictions a window. An artifact
is its dequantised weights in transformers, in float32. The base itself came as a file whose
blocks are Q4_1 and whose embedding is Q8_0: the row "origin", which is exact, so Q4_1 is here.
"""

import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from data.evidence.copies import COPIES
from data.evidence.pieces import ADAPTERS, RESULTS, WORK, Piece
from lib import coa
from lib.base.embedded import EMBEDDED, embedded_gguf, locate
from lib.base.model import load_model, load_tokenizer
from lib.base.records import normalised, sensors
from lib.coa.configuration import block_linears
from lib.deploy.deployment import FAST, GRADIENTS, TABLES
from lib.deploy.packed import save_packed, tables
from lib.errors import require
from lib.evaluate.scores import paired_interval
from lib.files import MANIFEST, ROOT, read_json, scratch, size_mb, verified, writing
from lib.quantize.correction import WEIGHED_BY, encode_with_feedback, input_roots
from lib.quantize.formats import decode, encode, fitting, round_trip
from lib.quantize.gguf import Encoded, write_model
from lib.quantize.merging import load_saved, save_quantized

TEXT = ROOT / "data" / "wikitext2" / "wiki.test.raw"
CONTEXT, COUNT = 512, 32  # tokens of a window, windows: about a minute on 2 cores
FOLDER = WORK / "wikitext"
# Plainly rounded, all matrices, the embedding among them. Q4_K falls back where rows are 576.
TYPES = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL", "MXFP4", "Q4_K")
ON_COPIES = ("F32", "Q8_0", "Q5_1", "Q5_0", "nf4", "Q4_1", "Q4_0", "IQ4_NL", "MXFP4")
EXACT = 1e-4  # how far a copy's logits may be from the base's, over the largest
Made = tuple[PreTrainedModel, float | None]  # a model, and MB of its file


def windows(count: int = COUNT) -> Tensor:
    """(count, 512) token ids."""
    ids = load_tokenizer()(TEXT.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    every = torch.tensor(ids[: len(ids) // CONTEXT * CONTEXT]).view(-1, CONTEXT)
    return every[:: len(every) // count][:count]


@torch.no_grad()
def last_states(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """(windows, tokens - 1, width): what the head reads at each prediction."""
    return torch.stack([model.model(input_ids=row[None], use_cache=False).last_hidden_state[0, :-1]
                        for row in ids])


def reference() -> tuple[Tensor, Tensor, Tensor]:
    """The windows, the 16-bit model's `last_states` and its head; computed once."""
    ids, out = windows(), FOLDER / "reference"
    digest = hashlib.sha256(ids.numpy().tobytes()).hexdigest()
    if not (out / MANIFEST).is_file() or verified(out).get("windows") != digest:
        model = load_model(dtype=torch.float32)
        with writing(out, windows=digest) as part:
            save_file({"states": last_states(model, ids),
                       "head": model.get_output_embeddings().weight.data},
                      part / "reference.safetensors")
    stored = load_file(out / "reference.safetensors")
    return ids, stored["states"], stored["head"]


@torch.inference_mode()
def measure(model: PreTrainedModel, ids: Tensor, states: Tensor, head: Tensor
            ) -> dict[str, list[float]]:
    """Each window's mean: loss of model and reference, divergence (nats), equal top tokens."""
    rows: dict[str, list[float]] = {"loss": [], "reference": [], "kl": [], "same_top": []}
    for row, state in zip(ids, states, strict=True):
        logits = model(input_ids=row[None], use_cache=False).logits[0, :-1]
        ours, true = logits.float().log_softmax(-1), (state @ head.T).log_softmax(-1)
        values = (-ours.gather(1, row[1:, None]), -true.gather(1, row[1:, None]),
                  (true.exp() * (true - ours)).sum(-1), ours.argmax(-1) == true.argmax(-1))
        for name, value in zip(rows, values, strict=True):
            rows[name].append(float(value.double().mean()))
    return rows


def summary(rows: Mapping[str, list[float]]) -> dict[str, Any]:
    """Means with 95 % intervals over windows (Student's t), and the windows' own."""
    columns = {name: torch.tensor(values, dtype=torch.float64) for name, values in rows.items()}
    gap = columns["loss"] - columns["reference"]
    shown = {"perplexity": (columns["loss"], True), "ratio": (gap, True),
             "kl": (columns["kl"], False), "same_top": (columns["same_top"], False)}
    found = {}
    for name, (values, log) in shown.items():
        interval = torch.tensor(paired_interval(values), dtype=torch.float64)
        interval = (interval.exp() if log else interval).tolist()
        found[name] = dict(zip(("value", "low", "high"), interval, strict=True))
    return found | {"windows": {name: [round(x, 6) for x in values]
                                for name, values in rows.items()}}


def matrices(model: PreTrainedModel) -> dict[str, Tensor]:
    """All matrices by module, the embedding among them, a tied head once."""
    return {name.removesuffix(".weight"): p.data for name, p in model.named_parameters()
            if p.dim() == 2}


def put(model: PreTrainedModel, encoded: Mapping[str, Encoded], write: bool = True) -> Made:
    """The model with these matrices, and the size of the file that holds them, if written."""
    for name, (kind, data) in encoded.items():
        model.get_submodule(name).weight.data.copy_(decode(data, kind))
    if not write:
        return model, None
    with scratch(FOLDER / "file") as part, embedded_gguf() as source:
        write_model(source, part / "model.gguf", weights=model, encoded=encoded)
        return model, size_mb(part / "model.gguf")


def of_type(kind: str, model: PreTrainedModel | None = None, table: str = "") -> Made:
    """All matrices in one GGUF type, or llama.cpp's replacement where it does not fit.

    The embedding is in another one if `table` is given.
    """
    whole = model or load_model(dtype=torch.float32)
    kinds = {name: table if table and name in tables(whole) else fitting(kind, w.shape[1])
             for name, w in matrices(whole).items()}
    return put(whole, {name: (kinds[name], encode(w, kinds[name], name=name))
                       for name, w in matrices(whole).items()}, write=model is None)


def nf4(model: PreTrainedModel | None = None) -> Made:
    """The blocks' linears in bitsandbytes' NF4, in blocks of 64, double quantisation."""
    whole = model or load_model(dtype=torch.float32)
    for linear in block_linears(whole).values():
        codes, state = bnb.quantize_4bit(linear.weight.data, blocksize=64, quant_type="nf4",
                                         compress_statistics=True)
        linear.weight.data = bnb.dequantize_4bit(codes, state)
    return whole, None if model else size_mb(saved(4))


def saved(bits: int) -> Path:
    """The folder of the base as bitsandbytes saves it."""
    out = FOLDER / f"saved_{bits}"
    if not (out / MANIFEST).is_file():
        save_quantized(Path(locate(EMBEDDED)), out, bits)
    return out


def opened() -> tuple[coa.Switchable, list[Any]]:
    """The base as the search sees it, and the sensors' examples that weigh errors."""
    base = coa.Switchable(load_model(dtype=torch.float16), dtype=torch.float32)
    return base, [*map(normalised, sensors("train", WEIGHED_BY))]


def mixed(budget: str, plain: bool = False) -> Made:
    """The types of `mixed` for a budget, without an adapter.

    Rounded as `deploy` does, Q4_0 by what the sensors' inputs feel, or `plain`.
    """
    row = read_json(RESULTS / "mixed.json")["result"][budget]
    (base, records), tokenizer = opened(), load_tokenizer()
    felt = coa.sensitivities(base, records[:GRADIENTS], tokenizer=tokenizer, learn="last")
    configuration = coa.greedy_configuration(
        base.layers, row["bits"] + 1e-6, FAST, coa.format_errors(base, FAST) * felt[:, None])
    names = base.layers.names
    kinds = dict(zip(names, map(str, configuration.formats), strict=True))
    weights = {name: base.weight(i) for i, name in enumerate(names)}
    felt_by = () if plain else input_roots(base.model, names, records, tokenizer=tokenizer)
    roots = dict(zip(names, felt_by, strict=False))
    rounded = encode_with_feedback({n: w for n, w in weights.items()
                                    if kinds[n] == "Q4_0" and n in roots}, roots)
    encoded = {n: (kind, rounded[n] if n in rounded else encode(weights[n], kind))
               for n, kind in kinds.items()}
    model = load_model(dtype=torch.float32)
    return put(model, encoded | {name: (row["table"], encode(w, row["table"]))
                                 for name, w in matrices(model).items() if name not in encoded})


def packed(budget: str) -> Made:
    """The configuration that `packed` chose for a budget, without its adapter."""
    bits = read_json(RESULTS / "packed.json")["result"][budget]["bits"]
    base, _ = opened()
    known = coa.known_configurations(ADAPTERS / "sensors_coa", base)
    require(known, "sensors_coa has no front: store it with `python -m data.evidence front`")
    configuration = min((one for one, _ in known), key=lambda one: abs(one.bits - bits))
    table, held = TABLES["nf"][1], tables(base.model)
    linears = {f"{name}.weight" for name in base.layers.names}
    rest = {key: value for key, value in base.model.state_dict().items()
            if key not in linears and (key != "lm_head.weight" or "lm_head" in held)}
    with scratch(FOLDER / "file") as part:
        save_packed(base, configuration, part / "weights.safetensors", rest=rest,
                    table_format=table)
        mb = size_mb(part / "weights.safetensors")
    base.switch(configuration)
    for name in held:
        weight = base.model.get_submodule(name).weight
        weight.data = round_trip(weight.data, table)
    return base.model, mb


ARTIFACTS: dict[str, Callable[[], Made]] = {
    "F16": lambda: (load_model(dtype=torch.float32), size_mb(Path(locate(EMBEDDED)))),
    "bfloat16": lambda: (load_model(dtype=torch.bfloat16), None),
    "int8": lambda: (load_saved(saved(8), dtype=torch.float32), size_mb(saved(8))),
    "nf4": nf4,
    "origin": lambda: of_type("Q4_1", table="Q8_0"),
    **{kind: functools.partial(of_type, kind) for kind in TYPES},
    **{f"mixed-{budget}": functools.partial(mixed, budget) for budget in ("80", "92.4")},
    "mixed-80-plain": lambda: mixed("80", plain=True),
    **{f"packed-{budget}": functools.partial(packed, budget) for budget in ("80", "65")}}


def artifact(name: str) -> dict[str, Any]:
    """One artifact of the base."""
    kept = reference()
    model, mb = ARTIFACTS[name]()
    return _row(name, model, mb, kept)


def on_copy(copy: str, name: str) -> dict[str, Any]:
    """One type on a copy of the base; its own logits are the base's, or it is refused."""
    kept = ids, states, head = reference()
    model = COPIES[copy](load_model(dtype=torch.float32))
    true = states[0] @ head.T
    gap = float((last_states(model, ids[:1])[0] @ model.get_output_embeddings().weight.T - true)
                .abs().max() / true.abs().max())
    require(gap < EXACT, f"the {copy} copy's logits differ by {gap:.1e}: it is another model")
    if name != "F32":
        model, _ = nf4(model) if name == "nf4" else of_type(name, model)
    return _row(f"{copy} {name}", model, None, kept) | {"copy": copy, "logits_differ": gap}


def _row(name: str, model: PreTrainedModel, mb: float | None,
         kept: tuple[Tensor, Tensor, Tensor]) -> dict[str, Any]:
    row = {"context": CONTEXT, "stride": CONTEXT, "tokens": kept[0].numel(), "mb": mb,
           } | summary(measure(model, *kept))
    print(f"  {name}: {mb or 0:.1f} MB, perplexity {row['perplexity']['value']:.3f}, ratio "
          f"{row['ratio']['value']:.4f}, KL {row['kl']['value']:.5f}, same top "
          f"{row['same_top']['value']:.1%}", flush=True)
    return row


def errors() -> dict[str, Any]:
    """{copy: {type: squared error of all blocks' linears over their squares}}; "" is the base."""
    rows = {}
    for copy in ("", *COPIES):
        model = load_model(dtype=torch.float32)
        weights = [m.weight.data for m in block_linears(
            COPIES[copy](model) if copy else model).values()]
        total = sum(float(w.double().square().sum()) for w in weights)
        rows[copy] = {kind: sum(float((decode(encode(w, kind), kind) - w).double().square().sum())
                                for w in weights) / total
                      for kind in TYPES if fitting(kind, 576) == kind}
        print(f"  {copy or 'base'}: {rows[copy]}", flush=True)
    return rows


PIECES = {"wikitext-errors": Piece("wikitext/errors", errors)} | {
    f"wikitext-{name}": Piece(f"wikitext/{name}", functools.partial(artifact, name))
    for name in ARTIFACTS} | {
    f"wikitext-{copy}-{name}": Piece(f"wikitext/{copy}-{name}",
                                     functools.partial(on_copy, copy, name))
    for copy in COPIES for name in ON_COPIES}
