"""From an adapter and budgets of bytes to files that run: packed NormalFloat, or GGUF."""

import contextlib
import json
import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lib import coa, serve, train
from lib.base import encode as token_ids
from lib.base.model import context, dequantized_base, load_model, load_tokenizer, release_memory
from lib.base.records import LABEL, Record, chat, movies, normalised, sensors
from lib.deploy.evaluation import Evaluation, evaluate
from lib.deploy.packed import WEIGHTS, packed_ms, save_packed, tables
from lib.errors import require
from lib.evaluate.scores import held_out_loss, peak_memory
from lib.files import MANIFEST, ROOT, read_json, require_free, scratch, swap, writing
from lib.quantize.correction import WEIGHED_BY, encode_with_feedback, input_roots
from lib.quantize.formats import Format, GgufFormat, decode, encode, round_trip
from lib.quantize.gguf import Encoded, base_file, export

TASKS = {"sensors": sensors, "movies": movies}
# The embedding, and a head of its own, are the largest matrices; the layers take what they leave.
TABLES: dict[str, tuple[coa.AnyFormat, ...]] = {
    "nf": (Format(8, 8, "bf16", 64, 256), Format(4, 4, "bf16", 16, 256)),
    "gguf": (GgufFormat("Q8_0"), GgufFormat("Q4_0"))}
# Fast for their size: Q5_0's fifth bit costs the speed its bytes save (`data/results/engine.json`).
FAST = (GgufFormat("Q4_0"), GgufFormat("Q8_0"))
MB, MARGIN = 10**6, 150_000  # bytes; those of names, shapes, our template
GRADIENTS, HELD, TOKENS = 4, 48, 32  # examples that weigh errors, that choose; tokens timed


@dataclass(frozen=True)
class Cost:
    """Peak resident memory, MB (10^6 bytes), and ms a decoded token; also limits of both."""

    memory_mb: float = math.inf
    token_ms: float = math.inf

    def __str__(self) -> str:
        return f"{self.memory_mb:.0f} MB of memory and {self.token_ms:.1f} ms a token"


@dataclass(frozen=True)
class Deployed:
    """What was written, and how good it is; sizes of all files in MB (10^6 bytes)."""

    configuration: coa.Configuration
    table: coa.AnyFormat  # of the embedding
    actual_mb: float
    loss: float  # held-out, nats a token, of the weights as they are written
    evaluation: Evaluation  # of answers by the files as they are read back
    cost: Cost  # measured here

    def __str__(self) -> str:
        scores = "".join(f", {name} {score}" for name, score in self.evaluation.scores.items())
        return (f"{self.actual_mb:.1f} MB\nheld-out loss {self.loss:.4f}{scores}\n"
                f"{self.configuration}, embedding in {self.table}\nmeasured here: {self.cost}")


def shipped(task: str, form: str = "packed") -> dict[str, Any]:
    """Arguments of `deploy` for one of the course's adapters and its task."""
    require(task in TASKS, f"unknown task {task!r}: use one of {', '.join(TASKS)}")
    name, route = ("qlora", "dequantized") if form == "gguf" else ("coa", "")
    return {"adapter": ROOT / "data" / "adapters" / f"{task}_{name}", "form": form, "route": route,
            "records": [*map(normalised, TASKS[task]("train", WEIGHED_BY))],
            "held": [*map(normalised, TASKS[task]("validation", HELD))]}


class Deployment:
    """An adapter on its base, opened once for any number of budgets."""

    def __init__(self, adapter: Path, form: str, route: str, *, records: Sequence[Record],
                 held: Sequence[Record], model: str = "") -> None:
        self.adapter, self.records, self.held = adapter.absolute(), records[:WEIGHED_BY], held
        aware, file = (adapter / "coa.safetensors").is_file(), adapter / MANIFEST
        manifest = read_json(file) if file.is_file() else {}
        self.family = {"packed": "nf", "": manifest.get("grid")}.get(form) or "gguf"
        require(manifest.get("grid") in (None, self.family) and not (aware and route), f"{adapter} "
                f"is for {manifest.get('grid')} formats: leave --format and --route out")
        self.name, self.route = train.settled(
            adapter, model, "original" if aware else route, rounded=True)
        self.tokenizer = load_tokenizer(str(adapter), base=self.name)
        self.learn = manifest.get("settings", {}).get("learn", "all")
        self.longest = max(len(token_ids(self.tokenizer, record, learn="last")[0])
                           for record in (*self.records, *held))
        whole = (dequantized_base(self.name) if self.route == "dequantized"
                 else load_model(self.name, dtype=torch.float16))
        self.base = base = coa.Switchable(whole, name=self.name, cache_mb=0)
        # Read before the adapter is added, which renames the layers.
        self.parameters, self.tables = base.model.num_parameters(), tables(base.model)
        require(self.longest <= context(base.model), f"a record has {self.longest} tokens, and the "
                f"model's context {context(base.model)}: split it")
        tied = {"lm_head.weight"} - {f"{name}.weight" for name in self.tables}
        self.rest = {key: value for key, value in base.model.state_dict().items()
                     if key not in tied | {f"{name}.weight" for name in base.layers.names}}
        self.formats = FAST if self.family == "gguf" else coa.best_formats()
        felt = coa.sensitivities(base, records[:GRADIENTS], tokenizer=self.tokenizer, learn="last")
        self.errors = coa.format_errors(base, self.formats) * felt[:, None]
        own, self.roots = manifest.get("configuration"), []  # the only one that it was trained for
        self.own = coa.Configuration.from_json(own, base.layers) if own else None
        self.known = [(self.own, 0.0)] if self.own else coa.known_configurations(adapter, base)
        self.coa = coa.CoaLora.from_pretrained(base, adapter) if aware else None
        self.model = self.coa.model if self.coa else train.load_adapter(base.model, adapter)
        self.factors, self.encoded = train.adapter_factors(adapter), {}
        require({*self.factors} <= {*base.layers.names},
                f"{adapter} adapts more than the blocks' linear layers: export it instead")

    def fixed_bytes(self, table: coa.AnyFormat) -> int:
        """Bytes of all but the blocks' linears: an adapter, 800 for a packed layer's names, ..."""
        factors = sum(a.numel() + b.numel() for a, b, _ in self.factors.values())
        return (2 * factors + 800 * len(self.base.layers.names)) * (self.family == "nf") + sum(
            -(-table.storage_bits(value.numel()) // 8) if key.removesuffix(".weight") in self.tables
            else 4 * value.numel() for key, value in self.rest.items())

    def write(self, budget_mb: float, out: Path, fixed: int, source: Any) -> tuple[Any, ...]:
        """Files under a budget, and what `Deployed` says; `fixed`: bytes of metadata, tokenizer."""
        layers, room, found = self.base.layers, budget_mb * MB - fixed, []
        cheapest = self.own or coa.Configuration.uniform(layers, self.formats[0])
        sizes = {table: self.fixed_bytes(table) for table in TABLES[self.family]}
        least = min(sizes.values()) + min(c.bytes for c in (cheapest, *(c for c, _ in self.known)))
        require(room < 2 * self.parameters, f"{budget_mb:g} MB hold the model in 16 bits "
                f"({(fixed + 2 * self.parameters) / MB:.0f} MB): use `export --type F16`")
        whole, more = (fixed + least) / MB, -(room - least) // 1e5 / 10 + 0.1  # rounded up
        require(least <= room, f"the smallest files take {whole:.2f} MB: give {more:.1f} MB more")
        with scratch() as work:
            for table, size in sizes.items():
                fits = [(loss, c) for c, loss in self.known if c.bytes <= room - size]
                if not fits and cheapest.bytes > room - size:
                    continue
                bits = max(8 * (room - size - MB / 50) / sum(layers.sizes), cheapest.bits)
                configuration = min(fits, key=lambda row: row[0])[1] if fits else (
                    coa.greedy_configuration(layers, bits, self.formats, self.errors))
                mine = self.adapter
                if self.coa:
                    mine = work / str(len(found)) / self.adapter.name
                    self.coa.materialise(configuration, mine)
                    self.tokenizer.save_pretrained(mine)  # it has the template
                found.append((*self.tried(configuration, table, mine), configuration, table, mine))
            loss, encoded, configuration, table, mine = min(found, key=lambda row: row[0])
            if self.family == "nf":
                self.pack(configuration, table, mine, out)
            else:  # all matrices are encoded already: the rest are vectors
                export(out, weights=load_model(self.name, dtype=torch.float32), encoded=encoded,
                       model=self.name, route=self.route, merged=mine, source=source)
        actual = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
        require(actual <= budget_mb * MB, f"it has {actual / MB:.2f} MB: try another --budget-mb")
        return configuration, table, actual / MB, loss

    def tried(self, configuration: coa.Configuration, table: coa.AnyFormat, mine: Path
              ) -> tuple[float, dict[str, Encoded]]:
        """Held-out loss, and for GGUF the matrices as they are written, adapter `mine` folded."""
        plain = {name: self.rest[f"{name}.weight"] for name in self.tables}
        self.base.switch(configuration)
        encoded = self.folded(configuration, mine) if self.family == "gguf" else {}
        if encoded:
            self.base.point([decode(data, kind) for kind, data in encoded.values()])
            encoded |= {name: (str(table), encode(plain[name], str(table))) for name in plain}
        for name, weight in plain.items():
            module = self.base.model.get_submodule(name)
            module.weight.data = round_trip(weight, table).to(weight)  # until the next try
        with self.model.disable_adapter() if encoded else contextlib.nullcontext():
            return held_out_loss(self.model, self.tokenizer, self.held, learn=self.learn), encoded

    def folded(self, configuration: coa.Configuration, mine: Path) -> dict[str, Encoded]:
        """Each layer with its part of an adapter in its type; Q4_0 is rounded with feedback.
        U depends on a layer's own format alone, so each is encoded once a type, for all budgets."""
        names, factors = self.base.layers.names, train.adapter_factors(mine)
        self.roots = self.roots or input_roots(  # nearly the same at all configurations
            self.base.model, names, self.records, tokenizer=self.tokenizer)
        kinds = dict(zip(names, map(str, configuration.formats), strict=True))
        weights = {name: self.base.weight(index) for index, name in enumerate(names)
                   if (name, kinds[name]) not in self.encoded}
        for name, (a, b, scale) in factors.items():
            if name in weights:
                weights[name] = weights[name] + scale * b @ a
        fed = encode_with_feedback({n: w for n, w in weights.items() if kinds[n] == "Q4_0"},
                                   dict(zip(names, self.roots, strict=True)))
        self.encoded |= {(name, kinds[name]): fed[name] if name in fed else
                         encode(w, kinds[name], name=name) for name, w in weights.items()}
        return {name: (kind, self.encoded[name, kind]) for name, kind in kinds.items()}

    def pack(self, configuration: coa.Configuration, table: Format, mine: Path, out: Path) -> None:
        """Write packed weights and an adapter beside them, in float16, as one artifact."""
        config, tensors = train.adapter_files(mine)
        with writing(out, base=self.name) as part:
            self.tokenizer.save_pretrained(part)
            self.base.model.config.save_pretrained(part)
            save_packed(self.base, configuration, part / WEIGHTS, rest=self.rest,
                        table_format=table)
            (beside := part / "adapter").mkdir()
            halves = {name: tensor.half() for name, tensor in tensors.items()}
            save_file(halves, beside / "adapter_model.safetensors")
            (beside / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
            train.make_portable(beside, self.name)


def deploy(adapter: Path, budgets: Sequence[float], out: Path, *, records: Sequence[Record],
           held: Sequence[Record], form: str = "", route: str = "", limits: Cost = Cost(),
           model: str = "", converter: Path | None = None) -> dict[float, Deployed]:
    """Write one artifact: the files of a budget in MB, or a folder for each of several.
    `form`: "packed", NormalFloat with the adapter beside, or "gguf", llama.cpp's types with the
    adapter folded in; by default what the adapter knows, else GGUF. `route` and `model` are as in
    `export`. The first `records` say what errors matter; those `held` choose, and are answered.
    UserError for a budget or limit that cannot be kept; nothing is written."""
    names, done = {budget: f"{budget:g}mb" for budget in budgets}, dict[float, Deployed]()
    require(budgets and all(b > 0 for b in budgets) and len({*names.values()}) == len(budgets),
            f"budget of {', '.join(f'{b:g}' for b in budgets)} MB: use numbers above 0, each once")
    require(min(limits.memory_mb, limits.token_ms) > 0, f"limits of {limits}: use some above 0")
    require_free(out, adapter)
    require(not (out / MANIFEST).exists(), f"{out} exists: choose a new folder")
    opened = Deployment(Path(adapter), form, route, records=records, held=held, model=model)
    with contextlib.ExitStack() as stack:
        if opened.family == "gguf":
            source = stack.enter_context(base_file(opened.name, out, converter))
            fixed = serve.Reader(source).data_offset + MARGIN
        else:
            require(not converter, "packed files need no --converter: leave it out")
            source, part = None, stack.enter_context(scratch())
            opened.tokenizer.save_pretrained(part)
            fixed = sum(f.stat().st_size for f in part.iterdir()) + MARGIN
        place = stack.enter_context(scratch(out) if len(budgets) == 1 else writing(
            out, name=opened.adapter.name, deployments=[*names.values()]))
        written = [opened.write(b, place / name, fixed, source) for b, name in names.items()]
        learn, longest = opened.learn, opened.longest
        del opened  # gigabytes, which a measurement needs again
        release_memory()
        for (budget, name), facts in zip(names.items(), written, strict=True):
            done[budget] = Deployed(*facts, *measured(place / name, held, learn, longest))
            spent = done[budget].cost
            require(spent.memory_mb <= limits.memory_mb and spent.token_ms <= limits.token_ms,
                    f"{done[budget].actual_mb:.1f} MB of files take {spent}, more than the limits: "
                    "lower the budget, or raise --memory-mb or --token-ms")
        if len(budgets) == 1:
            swap(place / name, out)
    return done


def measured(folder: Path, held: Sequence[Record], learn: str, longest: int
             ) -> tuple[Evaluation, Cost]:
    """Right answers of deployed files, and their cost in processes of their own."""
    asked = [record for record in held if "messages" in record  # calls of tools are not scored
             and not {"tools", "tool_calls"} & {*record, *record["messages"][-1]}
             and (LABEL in record) == (LABEL in held[0])]
    messages = asked[0]["messages"][:-1] if asked else chat("Hello.")
    with peak_memory(children=True) as peak:
        if (folder / "model.gguf").is_file():
            body = serve.question("", messages=messages, max_tokens=TOKENS, ignore_eos=True)
            most = min(1024, size := serve.open_bundle(folder).context, max([128, *(
                len(row["messages"][-1]["content"].encode()) for row in asked)]))  # as `evaluate`
            need = min(size, -(-(longest + most) // 256) * 256)
            more = ("--context", str(need)) if need > 2048 else ()  # than the server's own
            with serve.running(folder, *more) as server, serve.connect(server.url) as client:
                serve.ask(client, body)  # from now on the prompt is cached
                token_ms = 1e3 / serve.ask(client, body).decode
                evaluation = evaluate(server.url, asked, new_tokens=most) if asked else Evaluation()
        else:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                token_ms = pool.submit(packed_ms, folder, messages, TOKENS).result()
            evaluation = evaluate(str(folder), asked, learn=learn) if asked else Evaluation()
    return evaluation, Cost(peak["mb"], token_ms)
