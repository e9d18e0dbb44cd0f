"""From a budget for all files to files that run: packed NormalFloat weights and an adapter."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lib.base.embedded import EMBEDDED
from lib.base.model import best_dtype, load_tokenizer
from lib.base.records import Record, movies, sensors
from lib.coa.adapter import CoaLora
from lib.coa.configuration import Configuration, Layers, Switchable
from lib.errors import UserError, require
from lib.evaluate.scores import held_out_loss, keyword_score
from lib.files import MANIFEST, ROOT, read_json, replacing, require_free, sha256, verified, writing
from lib.quantize.formats import PARTS, Format, PackedLinear, pack_weight, quantize, unpack
from lib.train.lora import load_adapter

TASKS: dict[str, Callable[..., list[Record]]] = {"sensors": sensors, "movies": movies}
MB = 10**6
# The tied embedding is the largest matrix, so its format is chosen like those of the layers.
EMBEDDINGS = {"8 bits": Format(8, 8, "bf16", 64, 256), "4 bits": Format(4, 4, "bf16", 16, 256)}
EMBEDDING = "model.embed_tokens.weight"
HEADERS = 150_000  # bytes of the names and shapes of tensors, and of the configuration


def require_new(task: str, budget_mb: float, out: Path) -> None:
    """UserError unless the task is known, the budget positive, and `out` free."""
    require(task in TASKS, f"unknown task {task!r}: use one of {', '.join(TASKS)}")
    require(budget_mb > 0, f"budget of {budget_mb:g} MB: use a number above 0")
    require_free(out)
    require(not (out / MANIFEST).exists(), f"{out} exists: choose a new folder")


def load_base(model: str) -> Switchable:
    """The model of a deployment, with a tied embedding."""
    base = Switchable.load(model)
    require(base.model.config.tie_word_embeddings, f"{model} has a head apart from its "
            "embedding: use a model with tied ones")
    return base


def require_budget(budget_mb: float, least: float, most: float) -> None:
    """UserError unless the budget is between the bytes of the smallest and of the 16-bit files."""
    require(budget_mb * MB < most, f"{budget_mb:g} MB hold the model in 16 bits "
            f"({most / MB:.0f} MB): it need not be quantised")
    more = -(budget_mb * MB - least) // 1e5 / 10 + 0.1  # MB, rounded up to a tenth
    require(least <= budget_mb * MB, f"the smallest files take {least / MB:.2f} MB: "
            f"give {more:.1f} MB more")


def folder_size(folder: Path) -> int:
    """Bytes of all files."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def known_configurations(file: Path, base: Switchable, adapter: Path
                         ) -> list[tuple[Configuration, float]]:
    """The stored front of a search for this base and adapter: (configuration, held-out loss)."""
    stored = read_json(file)
    require(isinstance(stored, dict) and stored.get("front"),
            f"{file} is not the front of a search: search again")
    for key, ours in (("base_hash", base.fingerprint), ("adapter", sha256(adapter / MANIFEST))):
        require(stored.get(key) == ours,
                f"{file} is the front of another {key.removesuffix('_hash')}: search again")
    try:
        return [(Configuration.from_json(row["configuration"], base.layers), float(row["loss"]))
                for row in stored["front"]]
    except (UserError, LookupError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{file} is damaged ({error}): search again") from None


@dataclass(frozen=True)
class Deployed:
    """What was written, and why; sizes of all files in MB (10^6 bytes)."""

    configuration: Configuration
    embedding: str  # how the tied embedding is stored
    predicted_mb: float
    actual_mb: float
    loss: float  # held-out, nats, of the configuration with its embedding
    score: str  # of test answers by the files as they were read back
    considered: int  # known configurations that fit the budget

    def __str__(self) -> str:
        return (f"score {self.score}, held-out loss {self.loss:.4f}\nchosen: "
                f"{self.configuration}, embedding in {self.embedding}; the least held-out loss "
                f"of {self.considered} known configurations that fit")


def deploy_packed(task: str, budget_mb: float, out: Path, *, examples: int = 32, held: int = 48,
                  model: str = EMBEDDED, folder: Path = ROOT / "data") -> Deployed:
    """Write the best known configuration under the budget as one artifact.

    `held` validation examples decide how the embedding is stored, `examples` test answers are
    scored by the files as read back. `folder` has `adapters/TASK_coa` and `fronts/TASK.json`.
    UserError for bad arguments or a budget too small or too large; nothing is written.
    """
    require_new(task, budget_mb, out)
    front = folder / "fronts" / f"{task}.json"
    require(front.is_file(), f"no search was made for {task} ({front}): use --format gguf")
    base, adapter = load_base(model), folder / "adapters" / f"{task}_coa"
    known, coa = known_configurations(front, base, adapter), CoaLora.from_pretrained(base, adapter)
    tokenizer, records = load_tokenizer(base.name), TASKS[task]("validation", held)
    rests = {name: pack_rest(base, fmt) for name, fmt in EMBEDDINGS.items()}
    sizes = {name: sum(t.nbytes for t in rest.values()) for name, rest in rests.items()}
    table = base.model.get_input_embeddings().weight
    plain, losses = table.data, {}
    with writing(out, task=task, budget_mb=budget_mb) as part:
        tokenizer.save_pretrained(part)
        base.model.config.save_pretrained(part)
        # The materialised adapter is at most as large as the stored one.
        fixed = folder_size(part) + HEADERS + (adapter / "adapter_model.safetensors").stat().st_size
        require_budget(budget_mb, fixed + min(c.bytes for c, _ in known) + min(sizes.values()),
                       fixed + 2 * base.model.num_parameters())
        fits = {name: [(loss, c) for c, loss in known if fixed + c.bytes + size <= budget_mb * MB]
                for name, size in sizes.items()}
        # Known losses are with the plain embedding: the best of each embedding is measured.
        best = {name: min(rows, key=lambda row: row[0])[1] for name, rows in fits.items() if rows}
        for name, configuration in best.items():
            table.data = embedding_of(rests[name], EMBEDDINGS[name], plain)
            base.switch(configuration)
            losses[name] = held_out_loss(coa.model, tokenizer, records)
        name = min(losses, key=lambda name: losses[name])
        coa.materialise(best[name], part / "adapter", dtype=torch.float16)
        save_packed(base, best[name], part / "layers.safetensors")
        save_file(rests[name], part / "rest.safetensors",
                  {"embedding": json.dumps(EMBEDDINGS[name].as_list())})
        score = str(keyword_score(_read(part, packed_layers=False), tokenizer,
                                  TASKS[task]("test", examples)))
        (part / "deployed.json").write_text(json.dumps(
            {"loss": losses[name], "score": score, "embedding": name}), encoding="utf-8")
    predicted = fixed + best[name].bytes + sizes[name]
    return Deployed(best[name], name, predicted / MB, folder_size(out) / MB, losses[name], score,
                    len({row[1] for rows in fits.values() for row in rows}))


def pack_rest(base: Switchable, fmt: Format) -> dict[str, Tensor]:
    """Everything but the blocks' linears: packed embedding, norms in float32."""
    state = base.model.state_dict()
    parts = pack_weight(quantize(state[EMBEDDING], fmt))
    return ({f"{EMBEDDING}.{name}": part for name, part in parts.items()}
            | {name: state[name].float() for name in state if "norm" in name})


def embedding_of(rest: Mapping[str, Tensor], fmt: Format, like: Tensor) -> Tensor:
    """The embedding of `pack_rest`, in the shape and dtype of `like`."""
    return unpack({name: rest[f"{EMBEDDING}.{name}"] for name in PARTS}, fmt, like.shape).to(like)


def load_deployed(directory: Path, *, packed_layers: bool = True) -> PeftModel:
    """What `deploy_packed` wrote, from its packed layers (small, slow) or unpacked once."""
    require("budget_mb" in verified(directory), f"{directory} is not from `deploy`: check it")
    return _read(Path(directory), packed_layers=packed_layers)


def _read(directory: Path, *, packed_layers: bool) -> PeftModel:
    config, file = AutoConfig.from_pretrained(directory), directory / "rest.safetensors"
    model = AutoModelForCausalLM.from_config(config, dtype=best_dtype()).eval()
    with safe_open(file, "pt") as reader:
        fmt = Format(*json.loads(reader.metadata()["embedding"]))
    rest, table = load_file(file), model.get_input_embeddings().weight
    table.data = embedding_of(rest, fmt, table)
    for name, norm in rest.items():
        if not name.startswith(EMBEDDING):
            model.get_parameter(name).data = norm.to(table.dtype)
    load_packed(model, directory / "layers.safetensors", packed_layers=packed_layers)
    return load_adapter(model, directory / "adapter")


def save_packed(base: Switchable, configuration: Configuration, out: Path) -> None:
    """Write the blocks' linears in the formats of a configuration as one safetensors file."""
    base.layers.require_same(configuration.layers)
    tensors = {}
    for index, fmt in enumerate(configuration.formats):
        parts = pack_weight(quantize(base.weight(index), fmt))
        tensors |= {f"{base.layers.names[index]}.{name}": part for name, part in parts.items()}
    with replacing(out) as part:
        # One entry: safetensors writes several in any order, so equal files would differ.
        save_file(tensors, part, {"packed": json.dumps(
            {"grid": "nf", "configuration": configuration.to_json()})})


def load_packed(model: PreTrainedModel, file: Path, *, packed_layers: bool = True
                ) -> Configuration:
    """Put a packed file's layers into a model of the same shape, packed or unpacked, in place."""
    layers = Layers.of(model)
    require(file.is_file(), f"{file} does not exist: check the path")
    try:
        with safe_open(file, "pt") as reader:
            facts = json.loads((reader.metadata() or {}).get("packed", "{}"))
            require(facts.get("grid") == "nf" and "configuration" in facts,
                    f"{file} is not a packed model: make it with save_packed")
            configuration = Configuration.from_json(facts["configuration"], layers)
            for name, fmt in zip(layers.names, configuration.formats, strict=True):
                plain = model.get_submodule(name)
                layer = PackedLinear({part: reader.get_tensor(f"{name}.{part}")
                                      for part in PARTS}, fmt, plain)
                weight = layer.weight  # a damaged part shows now
                if packed_layers:
                    model.set_submodule(name, layer)
                else:
                    plain.weight.data = weight.to(plain.weight.dtype)
    except UserError:
        raise
    except Exception as error:  # of safetensors, of JSON, of torch for a dtype
        raise UserError(f"{file} is damaged ({error}): make it again") from error
    return configuration
