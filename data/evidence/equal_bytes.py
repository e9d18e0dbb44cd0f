"""What a practitioner would do instead of CoA-LoRA: round one merged model, in the same bytes.

The QLoRA adapter of a task is merged and rounded to llama.cpp's Q4_0 and Q8_0. The files of one
budget have equal sizes: the ways differ only in which layers get Q8_0 and in how Q4_0 is rounded.
From 80 MB on, right answers can be compared with those of `edge_coa`, whose adapters were trained
on the original weights in other runs. Losses cannot, because its examples are others.
"""

import functools
import importlib.metadata
import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from data.evidence.pieces import WORK, Piece, score_row, served_score
from lib.base.model import load_model
from lib.base.records import Record
from lib.base.records import encode as token_ids
from lib.coa.configuration import Configuration
from lib.deploy.deployment import FAST, TASKS, Deployment, deploy, shipped
from lib.errors import UserError, require
from lib.evaluate.scores import batch_losses, held_out_loss
from lib.files import size_mb
from lib.quantize import correction
from lib.quantize.correction import (
    BLOCK,
    encode_with_feedback,
    input_roots,
    input_sums,
    pack_q4_0,
)
from lib.quantize.formats import decode, encode
from lib.quantize.gguf import Encoded, export
from lib.quantize.merging import merge

# MB of all files. In the first every matrix is Q4_0; `deploy`, which leaves room for metadata,
# starts a little higher.
BUDGETS = (77.6, 80.0)
LOSSES, ANSWERS = 256, 500
# Level switching after EvoPress (Sieberling et al. 2024): generations, children in each, how many
# of them are judged again; examples of the first and the second judgement, and of both draws.
# EvoPress has 150 generations of 128 and the divergence on 131,072 tokens, so this cannot judge it.
GENERATIONS, CHILDREN, FINALISTS, FEW, MANY, DRAWN_FROM = 15, 8, 2, 8, 48, 256
# AutoRound's light recipe (Cheng et al. 2024): steps and rate of each block, examples.
STEPS, RATE, TUNED_BY = 50, 5e-3, 128
FOLDER = WORK / "equal"
Judge = Callable[[Configuration, Sequence[Record]], float]


class MergedLayers:
    """A task's merged model, and its layers as each way rounds them, each made once."""

    def __init__(self, task: str) -> None:
        self.task, self.given = task, shipped(task, "gguf")
        self.opened = opened = Deployment(self.given["adapter"], "gguf", self.given["route"],
                                          records=self.given["records"], held=self.given["held"])
        self.names = names = opened.base.layers.names
        merged = merge(opened.adapter, route=opened.route)
        self.weights = {name: merged.get_submodule(name).weight.data for name in names}
        # From here on the adapter is in the weights.
        opened.base.point([*self.weights.values()])
        with opened.model.disable_adapter():
            squares = input_sums(opened.base.model, names, opened.records,
                                 tokenizer=opened.tokenizer,
                                 add=lambda total, x: total + x.square().sum(0))
        self.layers = {
            "Q8_0": {name: encode(weight, "Q8_0") for name, weight in self.weights.items()},
            "plain": {name: encode(weight, "Q4_0") for name, weight in self.weights.items()},
            "importance": {name: encode(weight, "Q4_0", importance=squares[name])
                           for name, weight in self.weights.items()},
            **self.with_feedback()}

    def with_feedback(self) -> dict[str, dict[str, np.ndarray]]:
        """All layers in Q4_0 as `deploy` rounds them, and with each block's scale as in "plain"."""
        opened = self.opened
        opened.base.switch(Configuration.uniform(opened.base.layers, FAST[0]))
        roots = dict(zip(self.names, input_roots(
            opened.base.model, self.names, opened.records, tokenizer=opened.tokenizer),
            strict=True))
        rounded = {"feedback": encode_with_feedback(self.weights, roots)}
        with mock.patch.object(correction.formats, "encode", lambda w, kind, importance: encode(
                w, kind)):
            return rounded | {"feedback, plain scales": encode_with_feedback(self.weights, roots)}

    def encoded(self, configuration: Configuration, rounding: str) -> dict[str, Encoded]:
        """The layers of a configuration, Q4_0 rounded in one of the ways."""
        kinds = dict(zip(self.names, map(str, configuration.formats), strict=True))
        return {name: (kind, self.layers[rounding if kind == "Q4_0" else kind][name])
                for name, kind in kinds.items()}

    @functools.lru_cache(2)  # noqa: B019 (one or two live as long as the process)
    def decoded(self, rounding: str) -> list[Tensor]:
        """The weights of all layers in Q8_0, or in Q4_0 in one of the ways."""
        kind = "Q8_0" if rounding == "Q8_0" else "Q4_0"
        return [decode(self.layers[rounding][name], kind) for name in self.names]

    def judge(self, configuration: Configuration, records: Sequence[Record], *, rounding: str
              ) -> float:
        """Loss of records, the embedding as it is."""
        self.opened.base.point([self.decoded("Q8_0" if kind == "Q8_0" else rounding)[i]
                                for i, kind in enumerate(configuration.formats)])
        with self.opened.model.disable_adapter():
            return held_out_loss(self.opened.model, self.opened.tokenizer, records)


@functools.lru_cache(1)
def merged_layers(task: str) -> MergedLayers:
    """A task's model, opened once for all budgets."""
    return MergedLayers(task)


def child_of(parent: Configuration, rng: random.Random) -> Configuration:
    """A few layers swap types with others of as many weights."""
    formats, sizes = [*parent.formats], parent.layers.sizes
    for _ in range(rng.choice((1, 1, 2, 3))):
        pairs = [(i, j) for i, one in enumerate(formats) for j, other in enumerate(formats)
                 if (one, other) == (FAST[1], FAST[0]) and sizes[i] == sizes[j]]
        i, j = rng.choice(pairs)
        formats[i], formats[j] = formats[j], formats[i]
    return Configuration(parent.layers, tuple(formats))


def evolution(parent: Configuration, judge: Judge, records: Sequence[Record], *, seed: int = 0
              ) -> Configuration:
    """Level switching: each generation draws examples anew, on which the parent counts, too."""
    rng = random.Random(seed)
    for generation in range(GENERATIONS):
        children: list[Configuration] = []
        while len(children) < CHILDREN:
            child = child_of(parent, rng)
            if child not in (parent, *children):
                children.append(child)
        few, many = rng.sample(records, FEW), rng.sample(records, MANY)
        children.sort(key=lambda child: judge(child, few))
        rows = [(judge(one, many), -i, one) for i, one in enumerate(
            (*children[:FINALISTS], parent))]
        loss, _, parent = min(rows, key=lambda row: row[:2])
        print(f"    generation {generation + 1}: {loss:.5f}", flush=True)
    return parent


def rivals(task: str, budget: float) -> dict[str, Any]:
    """Each way's file at a budget."""
    merged = merged_layers(task)
    shutil.rmtree(FOLDER / "deployed", ignore_errors=True)
    if budget == min(BUDGETS):
        kept = {"table": "Q4_0"}
        configuration = Configuration.uniform(merged.opened.base.layers, FAST[0])
    else:
        done = deploy(budgets=[budget], out=FOLDER / "deployed", **merged.given)[budget]
        configuration, kept = done.configuration, {"table": str(done.table)}
    ways = {way: (configuration, way) for way in (
        "plain", "importance", "feedback", "feedback, plain scales")}
    if budget != min(BUDGETS):
        records = TASKS[task]("validation", DRAWN_FROM)
        losses = {way: merged.judge(configuration, records, rounding=way)
                  for way in ("importance", "feedback")}
        kept["rounding"] = min(losses, key=losses.get)
        ways["switching"] = evolution(configuration, functools.partial(
            merged.judge, rounding=kept["rounding"]), records), kept["rounding"]
    rows = rows_of(merged, ways, kept["table"])
    return {"ways": rows, "bits": configuration.bits} | kept


def rows_of(merged: MergedLayers, ways: Mapping[str, tuple[Configuration, str]], table: str
            ) -> dict[str, Any]:
    """{way: its file measured}, from its configuration and its way to round Q4_0."""
    rows = {}
    for way, (configuration, rounding) in ways.items():
        row = rows[way] = file_row(merged, merged.encoded(configuration, rounding), table)
        print(f"  {merged.task}, {way}: {row['mb']:.2f} MB, loss {row['loss']:.4f}, "
              f"{row['test']['share']:.1%}", flush=True)
    require(len({row["mb"] for row in rows.values()}) == 1, "the ways' files differ in size")
    return rows


def file_row(merged: MergedLayers, encoded: dict[str, Encoded], table: str) -> dict[str, Any]:
    """A file's size, the loss of test examples and its right answers, served."""
    opened, folder = merged.opened, FOLDER / merged.task
    for name in opened.tables:
        encoded[name] = table, encode(opened.rest[f"{name}.weight"], table)
    export(folder, weights=load_model(opened.name, dtype=torch.float32), encoded=encoded,
           model=opened.name, route=opened.route, merged=opened.adapter)
    # transformers' own reader of GGUF: it shares no code with our writer.
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="model.gguf", dtype=torch.float32).eval()
    records = TASKS[merged.task]("test", ANSWERS)
    pairs = (token_ids(opened.tokenizer, record) for record in records[:LOSSES])
    with torch.inference_mode():
        sums, counts = zip(*batch_losses(model, pairs, 1), strict=True)
    return {"mb": size_mb(folder / "model.gguf"), "loss": sum(sums) / sum(counts),
            "losses": [round(loss / count, 6) for loss, count in zip(sums, counts, strict=True)],
            "test": score_row(served_score(folder, records))}


def slower(task: str) -> dict[str, Any]:
    """All blocks by AutoRound, whose symmetric 4 bits in groups of 32 are Q4_0.

    Both have a float16 scale and codes from -8 to 7.
    """
    try:
        from auto_round import AutoRound
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: `python -m pip install --no-deps "
                        "auto-round==0.16.1 py-cpuinfo`") from None
    merged = merged_layers(task)
    opened, start = merged.opened, time.monotonic()
    batches = [torch.tensor([token_ids(opened.tokenizer, record)[0]])
               for record in TASKS[task]("train", TUNED_BY)]
    # Eight examples a step, one at a time, because they have different lengths.
    tuning = AutoRound(
        merge(opened.adapter, route=opened.route), opened.tokenizer, bits=4, group_size=32,
        sym=True, dataset=batches, iters=STEPS, lr=RATE, nsamples=TUNED_BY, seqlen=2,
        batch_size=1, gradient_accumulate_steps=8, device_map="cpu", amp=False)
    rounded, _ = tuning.quantize()
    seconds = round(time.monotonic() - start)
    merged.layers["autoround"] = {
        name: as_q4_0(name, rounded.get_submodule(name)) for name in merged.names}
    only = Configuration.uniform(opened.base.layers, FAST[0])
    ways = {"autoround": (only, "autoround")}
    return {"ways": rows_of(merged, ways, "Q4_0"), "autoround_seconds": seconds,
            "autoround": importlib.metadata.version("auto-round")}


def as_q4_0(name: str, layer: Any) -> np.ndarray:
    """AutoRound's codes and scales of a layer, packed as Q4_0."""
    scales, weight = layer.scale.half(), layer.weight.data.float()
    blocks = weight.view(*scales.shape, BLOCK)
    codes = (blocks / scales.float()[..., None]).round() + 8
    data = pack_q4_0(codes.byte().view(weight.shape), scales)
    steps = (decode(data, "Q4_0").view_as(blocks) - blocks).abs() / scales.float().abs()[..., None]
    require(float(steps.max()) < 0.05, f"{name} is not in Q4_0's form: use auto-round==0.16.1")
    return data


PIECES = {f"equal-{task}-{budget:g}": Piece(f"equal/{task}-{budget:g}",
                                            functools.partial(rivals, task, budget))
          for task in ("movies", "sensors") for budget in BUDGETS} | {
    f"equal-{task}-slower": Piece(f"equal/{task}-{min(BUDGETS):g}-slower",
                                  functools.partial(slower, task))
    for task in ("movies", "sensors")}
