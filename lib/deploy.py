"""From a budget of bytes to files that run: packed NormalFloat weights with their adapter.

The budget counts every file that is written: linear layers, the tied
embedding, norms, adapter, tokenizer, configuration.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from lib.artifacts import MANIFEST, ROOT, read_json, require_free, sha256, verified, writing
from lib.base_model import best_dtype, load_tokenizer, quiet
from lib.coa import CoaLora
from lib.configuration import Configuration, Level
from lib.embedded import EMBEDDED
from lib.errors import UserError, require
from lib.lora import load_adapter
from lib.packing import load_packed, packed, save_packed, unpack, unpacked
from lib.quantize import dequantize, quantize
from lib.surrogate import plan_of
from lib.switchable import Switchable
from lib.tasks import Record, held_out_loss, keyword_score, movies, sensors

TASKS: dict[str, Callable[..., list[Record]]] = {"sensors": sensors, "movies": movies}
MB = 10**6
# The tied embedding is the largest matrix: a variable like the layers.
EMBEDDINGS = {"8 bits": Level(8, 8, "bf16", 64, 256), "4 bits": Level(4, 4, "bf16", 16, 256)}
EMBEDDING = "model.embed_tokens.weight"


def known_plans(file: Path, base: Switchable, adapter: Path) -> list[tuple[Configuration, float]]:
    """The front that a search found: configurations with their held-out loss.

    Raises:
        UserError: no such file, or a front of another base or adapter.
    """
    found = read_json(file)
    require(isinstance(found, dict) and found.get("front"),
            f"{file} is no front of a search: search anew")
    for what, ours in (("base_hash", base.fingerprint), ("adapter", sha256(adapter / MANIFEST))):
        require(found.get(what) == ours, f"{file} is the front of another "
                f"{what.split('_')[0]}: search anew")
    try:
        return [(plan_of(base.layers, map(int, row["levels"].split())), float(row["loss"]))
                for row in found["front"]]
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{file} is damaged ({error}): search anew") from None


@dataclass(frozen=True)
class Deployed:
    """What was written, and why.

    Attributes:
        predicted_mb, actual_mb: size of all files, MB (10^6 bytes).
        loss: held-out loss, nats, of the plan with its embedding.
        embedding: how the tied embedding is stored.
        score: of test answers by the files as they were read back.
        considered: how many known plans fit the budget, with one of the embeddings.
    """

    plan: Configuration
    embedding: str
    predicted_mb: float
    actual_mb: float
    loss: float
    score: str
    considered: int

    def __str__(self) -> str:
        return (f"score {self.score}, held-out loss {self.loss:.4f}\nchosen: {self.plan}, "
                f"embedding in {self.embedding}; the least held-out loss of "
                f"{self.considered} known plans that fit")


# Names, places and shapes of 840 tensors, and the configuration as JSON.
HEADERS = 150_000


def deploy_packed(task: str, budget_mb: float, out: Path, *, examples: int = 32, held: int = 48,
                  model: str = EMBEDDED, folder: Path = ROOT / "data") -> Deployed:
    """Write the best known plan under the budget as one artifact.

    Args:
        examples: test answers that are scored, by the files as they are read back.
        held: validation examples whose loss decides how the embedding is stored.
        folder: has `adapters/TASK_coa` and `fronts/TASK.json`.

    Raises:
        UserError: an unknown task, a place that is taken, a budget below the
            smallest known plan or above the model in 16 bits; nothing is written.
    """
    require_new(task, budget_mb, out)
    front = folder / "fronts" / f"{task}.json"
    require(front.is_file(), f"no search was made for {task} ({front}): use --format gguf")
    quiet()
    base = Switchable.load(model)
    require_tied(base)
    weights = base.model.num_parameters()  # soon the adapter's are among them
    adapter = folder / "adapters" / f"{task}_coa"
    coa = CoaLora.from_pretrained(base, adapter)
    plans = known_plans(front, base, adapter)
    with writing(out, task=task, budget_mb=budget_mb) as part:
        coa.materialise(plans[0][0], part / "adapter", dtype=torch.float16)
        load_tokenizer(base.name).save_pretrained(part)
        base.model.config.save_pretrained(part)
        fixed = folder_size(part) + HEADERS
        plain = (2 * weights + fixed) / MB
        require(budget_mb < plain, f"{budget_mb:g} MB hold the model in 16 bits with its adapter "
                f"({plain:.0f} MB): nothing need be quantised")
        rests = {name: _rest(base, level) for name, level in EMBEDDINGS.items()}
        least = min(p.bytes for p, _ in plans) + min(map(_bytes, rests.values())) + fixed
        require(least <= budget_mb * MB, "the budget is below the smallest known plan, "
                f"{_up(least):g} MB: give {_up(least - budget_mb * MB):g} MB more")
        chosen, considered = _choose(
            TASKS[task]("validation", held), base, coa, plans, budget_mb * MB - fixed, rests)
        plan, name, loss = chosen
        coa.materialise(plan, part / "adapter", dtype=torch.float16)
        save_packed(base, plan, part / "layers.safetensors")
        save_file(rests[name], part / "rest.safetensors", {"embedding": json.dumps(
            EMBEDDINGS[name].as_list())})
        predicted = fixed + plan.bytes + _bytes(rests[name])
        score = keyword_score(_read(part, packed_layers=False),
                              load_tokenizer(base.name), TASKS[task]("test", examples))
        facts = {"loss": loss, "score": str(score), "embedding": name}
        (part / "deployed.json").write_text(json.dumps(facts), encoding="utf-8")
    return Deployed(plan, name, predicted / MB, folder_size(out) / MB, loss, str(score), considered)


def _choose(held: list[Record], base: Switchable, coa: CoaLora,
            plans: list[tuple[Configuration, float]], room: float,
            rests: dict[str, dict[str, torch.Tensor]]
            ) -> tuple[tuple[Configuration, str, float], int]:
    """The plan and embedding of least held-out loss that fit into `room` bytes.

    `rests` has, for each way to store the embedding, all that is no linear of a block.
    """
    sizes = {name: _bytes(rest) for name, rest in rests.items()}
    fits = [(loss, plan, name) for plan, loss in plans for name, size in sizes.items()
            if plan.bytes + size <= room]
    # Known losses are with the plain embedding: the best plan of each is measured with it.
    measured = []
    for name in dict.fromkeys(name for *_, name in fits):
        plan = min((loss, i) for i, (loss, _, n) in enumerate(fits) if n == name)
        measured.append((_loss_with(base, coa, fits[plan[1]][1], rests[name],
                                    EMBEDDINGS[name], held), name, fits[plan[1]][1]))
    loss, name, plan = min(measured, key=lambda row: row[0])
    return (plan, name, loss), len({plan for _, plan, _ in fits})


def _loss_with(base: Switchable, coa: CoaLora, plan: Configuration,
               rest: dict[str, torch.Tensor], level: Level, held: list[Record]) -> float:
    """Held-out loss of a plan with the embedding as it will be stored."""
    table = base.model.get_input_embeddings().weight
    plain = table.data
    table.data = _embedding(rest, level, plain)
    base.switch(plan)
    try:
        return held_out_loss(coa.model, load_tokenizer(base.name), held)
    finally:
        table.data = plain


def _rest(base: Switchable, level: Level) -> dict[str, torch.Tensor]:
    """Everything but the blocks' linears: packed embedding, norms in float32."""
    state = base.model.state_dict()
    rest = {f"{EMBEDDING}.{name}": part
            for name, part in packed(quantize(state[EMBEDDING], level)).items()}
    return rest | {name: state[name].float() for name in state if "norm" in name}


def _embedding(rest: dict[str, torch.Tensor], level: Level, like: torch.Tensor) -> torch.Tensor:
    """The embedding that `_rest` packed, in the shape and dtype of `like`."""
    parts = {name.removeprefix(f"{EMBEDDING}."): part for name, part in rest.items()
             if name.startswith(EMBEDDING)}
    return dequantize(unpacked(parts, level, like.numel())).view(like.shape).to(like)


def _bytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(t.nbytes for t in tensors.values())


def load_deployed(directory: Path, *, packed_layers: bool = True) -> PeftModel:
    """The model of a directory that `deploy_packed` wrote, with its adapter.

    Args:
        packed_layers: compute from the packed weights (small, slow); else
            unpack them once.

    Raises:
        UserError: no such directory, a missing or damaged file.
    """
    require("budget_mb" in verified(directory), f"{directory} is not from `deploy`: check it")
    return _read(Path(directory), packed_layers=packed_layers)


def _read(directory: Path, *, packed_layers: bool) -> PeftModel:
    config = AutoConfig.from_pretrained(directory)
    model = AutoModelForCausalLM.from_config(config, dtype=best_dtype()).eval()
    tensors = load_file(directory / "rest.safetensors")
    level = Level(*json.loads(_about(directory / "rest.safetensors")["embedding"]))
    table = model.get_input_embeddings().weight
    table.data = _embedding(tensors, level, table)
    for name, norm in tensors.items():
        if not name.startswith(EMBEDDING):
            model.get_parameter(name).data = norm.to(table.dtype)
    load_packed(model, directory / "layers.safetensors")
    if not packed_layers:
        unpack(model)
    return load_adapter(model, directory / "adapter")


def _about(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as reader:
        return reader.metadata()


def require_new(task: str, budget_mb: float, out: Path) -> None:
    """UserError unless all make sense and the place is free: what is there stays."""
    require(task in TASKS, f"unknown task {task!r}: use one of {', '.join(TASKS)}")
    require(budget_mb > 0, f"budget of {budget_mb:g} MB: use a number above 0")
    require_free(out)
    require(not (out / MANIFEST).exists(), f"{out} exists: choose a new folder")


def require_tied(base: Switchable) -> None:
    """UserError for a model with a head of its own: nothing here would store it."""
    require(base.model.config.tie_word_embeddings,
            f"{base.name} has a head apart from its embedding: give a model with tied ones")


def folder_size(folder: Path) -> int:
    """Bytes of all files."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def _up(size: float) -> float:
    """MB, rounded up to a tenth."""
    return math.ceil(size / MB * 10) / 10
