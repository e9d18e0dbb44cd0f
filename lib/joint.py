"""Training over many configurations, and the baselines in the same harness.

One configuration makes a dedicated adapter (QLoRA's way), many make
Shared-LoRA, many with a mixing network make CoA-LoRA. Everything else (data,
steps, step, optimizer) is the same, so a difference has one cause.
"""

import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerCallback

from lib.base_model import load_tokenizer, quiet
from lib.coa import NAME, CoaLora
from lib.configuration import KINDS, Configuration
from lib.errors import require
from lib.profiles import TrainSettings, seed_everything
from lib.switchable import Switchable
from lib.tasks import Record
from lib.train import TrainResult, make_trainer, run_trainer

METHODS = ("lora", "lq", "coa")
# Below it, nats, the gradient of the loss itself is followed again.
LEAST_LOSS = 0.02


def schedule(count: int, steps: int, seed: int) -> list[int]:
    """Which configuration each step uses: shuffled rounds, so that all get their turn."""
    rng, order = random.Random(seed), []
    while len(order) < steps:
        order += rng.sample(range(count), count)
    return order[:steps]


class _Switching(TrainerCallback):
    """The next configuration at the start of each optimizer step."""

    def __init__(self, base: Switchable, plans: Sequence[Configuration],
                 order: Sequence[int]) -> None:
        self.base, self.plans, self.order = base, plans, order

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.base.switch(self.plans[self.order[state.global_step]])


def _relative(trainer: Any) -> None:
    """Descend on the logarithm of the loss: a step's gradient over its loss.

    A configuration that few bits have broken has a hundred times the loss of a
    good one; its steps would drown the others. The value that is logged stays.
    """
    plain = trainer.compute_loss

    def compute(*args: Any, **options: Any) -> torch.Tensor:
        loss = plain(*args, **options)
        value = loss.detach()
        return value + (loss - value) / value.clamp(min=LEAST_LOSS)

    trainer.compute_loss = compute


def train_over(base: Switchable, records: Sequence[Record], plans: Sequence[Configuration],
               settings: TrainSettings, *, method: str = "coa", say_every: int = 0,
               callbacks: Sequence[TrainerCallback] = ()
               ) -> tuple[TrainResult, CoaLora | None]:
    """Train one adapter on a base that is at another configuration in each step.

    Args:
        base: a fresh switchable model; the adapter is added to it.
        plans: the configurations; one alone gives a dedicated adapter.
        method: "lora", plain; "lq", plain and started from the low-rank part of
            the first plan's quantisation error (LQ-LoRA, Guo et al. 2023,
            without its alternation); "coa", with the mixing network.

    Returns:
        The run with its model, and the adapter with its network for "coa".

    Raises:
        UserError: no plans, an unknown method, bad settings or records.
    """
    require(plans, "no configurations to train over: give at least one")
    require(method in METHODS, f"unknown method {method!r}: use one of {', '.join(METHODS)}")
    require(settings.mode == "lora" and set(settings.modules) == set(KINDS),
            "train over configurations with mode lora and targets aggressive")
    require(not hasattr(base.model, "peft_config"),
            "this base has an adapter already: load a fresh one")
    quiet()
    seed_everything(settings.seed)
    with tempfile.TemporaryDirectory() as work:
        trainer = make_trainer(base.model, load_tokenizer(), records, settings,
                               work=Path(work), say_every=say_every)
        trainer.args.save_strategy = "no"
        coa = CoaLora(trainer.model, base) if method == "coa" else None
        if method == "lq":
            start_from_error(trainer.model, base, plans[0])
        if len(plans) > 1:
            _relative(trainer)
        order = schedule(len(plans), settings.steps, settings.seed)
        for callback in (_Switching(base, plans, order), *callbacks):
            trainer.add_callback(callback)
        return run_trainer(trainer, settings), coa


@torch.no_grad()
def start_from_error(model: PeftModel, base: Switchable, plan: Configuration) -> None:
    """Set A and B to the best rank-r part of W - Q(W), by singular value decomposition.

    (alpha / r) B A = U_r S_r V_r^T, with the root of S_r on either side.
    """
    for index, (name, level) in enumerate(zip(plan.layers.names, plan.levels, strict=True)):
        layer = model.get_submodule(f"base_model.model.{name}")
        error = base.weight(index) - base.weight(index, level)
        rank, scale = layer.r[NAME], layer.scaling[NAME]
        left, values, right = torch.linalg.svd(error, full_matrices=False)
        root = (values[:rank] / scale).sqrt()
        layer.lora_B[NAME].weight.copy_(left[:, :rank] * root)
        layer.lora_A[NAME].weight.copy_(root[:, None] * right[:rank])
