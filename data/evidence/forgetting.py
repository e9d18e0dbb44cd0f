"""What a model forgets while it learns the sensors: the task's score and WikiText on the way.

At steps 0, 25, 50 and 100 of one run the weights, the adapter folded into the base it learns on,
are measured as they would be served; so ways to train can be read at equal score. The steps
before the last are taken while the learning rate is still high. Of further seeds only the last
step is measured.
"""

import dataclasses
import functools
from collections.abc import Collection
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel, TrainerCallback

from data.evidence.ledger import SEEDS
from data.evidence.pieces import WORK, Piece, score_row
from data.evidence.training_runs import FULL_RATE, REFERENCE
from data.evidence.wikitext import measure, reference, summary
from lib.base.embedded import EMBEDDED
from lib.base.model import best_dtype, frozen_weight, load_model, load_tokenizer, release_memory
from lib.base.records import sensors
from lib.evaluate.scores import keyword_score
from lib.train.training import train

STEPS, ANSWERS = (0, 25, 50, 100), 200
ARMS: dict[str, dict[str, Any]] = {
    "full": {"mode": "full", "learning_rate": FULL_RATE},
    **{f"lora-{rank}": {"mode": "lora", "rank": rank, "alpha": 2 * rank} for rank in (4, 16, 64)},
    "qlora-16": {"mode": "qlora", "rank": 16, "alpha": 32}}
ARMS |= {f"{arm}-seed-{seed}": ARMS[arm] | {"seed": seed} for seed in SEEDS[1:]
         for arm in ("full", "lora-16")}


@torch.no_grad()
def folded(model: Any, name: str = EMBEDDED) -> PreTrainedModel:
    """A plain copy of a model in training, its adapter folded into what it was trained on."""
    plain = load_model(name, dtype=torch.float32)
    layers = {key: m for key, m in model.named_modules() if isinstance(m, LoraLayer)}
    if not layers:
        plain.load_state_dict(model.state_dict())
    for key, layer in layers.items():
        weight, base = plain.get_submodule(key.removeprefix("base_model.model.")).weight, (
            layer.get_base_layer())
        if getattr(base.weight, "quant_state", None) is not None:
            weight.data.copy_(frozen_weight(base, torch.float32))
        for part, a in layer.lora_A.items():
            weight.data += layer.scaling[part] * layer.lora_B[part].weight @ a.weight
    return plain


class Forgetting(TrainerCallback):
    """Measures at some steps; rows are in the state's history, so that a resumed run has them."""

    def __init__(self, steps: Collection[int]) -> None:
        self.steps = steps

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None,
                       **_: Any) -> None:
        if state.global_step == 0:
            self.on_step_end(args, state, control, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None,
                    **_: Any) -> None:
        if state.global_step in self.steps:
            row = {"step": state.global_step, "forgetting": measured(model, state.global_step)}
            state.log_history.append(row)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.rows = {str(row["step"]): row["forgetting"] for row in state.log_history
                     if "forgetting" in row}


def measured(model: Any, step: int) -> dict[str, Any]:
    """WikiText and, once trained, answers of the task."""
    plain = folded(model).to(best_dtype()).eval()
    row: dict[str, Any] = {"wikitext": summary(measure(plain, *reference()))}
    if step:
        row["test"] = score_row(keyword_score(plain, load_tokenizer(), sensors("test", ANSWERS)))
    del plain
    release_memory()
    print(f"  step {step}: perplexity {row['wikitext']['perplexity']['value']:.2f}, "
          f"KL {row['wikitext']['kl']['value']:.4f}, "
          f"right {row.get('test', {}).get('share', 0):.1%}", flush=True)
    return row


def forgetting(arm: str) -> dict[str, Any]:
    """One way to train; a killed run goes on from its checkpoint."""
    settings = dataclasses.replace(REFERENCE, **ARMS[arm])
    out, callback = WORK / "forgetting" / arm, Forgetting(
        STEPS[-1:] if settings.seed else STEPS)
    result = train(sensors("train"), settings, out=out, say_every=10,
                   adapt=lambda trainer: trainer.add_callback(callback))
    return {"settings": dataclasses.asdict(settings), "trainable": result.trainable,
            "losses": [round(x, 4) for x in result.losses], "steps": callback.rows}


PIECES = {f"forgetting-{arm}": Piece(f"forgetting/{arm}", functools.partial(forgetting, arm))
          for arm in ARMS}
