"""Training over many configurations, and the baselines in the same harness.

One configuration makes a dedicated adapter (QLoRA), many a shared one, with a network CoA-LoRA.
"""

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from lib.base.model import MODULE_KINDS, load_tokenizer, release_memory
from lib.base.records import Record
from lib.coa.adapter import NAME, OWNED, CoaLora, MixingNetwork, learned_a
from lib.coa.configuration import Configuration, Switchable, best_formats
from lib.errors import require
from lib.files import scratch
from lib.host import process_count
from lib.quantize.correction import WEIGHED_BY, input_roots, low_rank
from lib.settings import TrainSettings, seed_everything
from lib.train.training import TrainResult, make_trainer, run_trainer

METHODS = ("lora", "coa", "paper")
LEAST_LOSS = 0.02  # nats; below it a step follows the gradient of the loss itself again


class Switching(TrainerCallback):
    """Another configuration for each part of an optimizer step, in shuffled rounds."""

    def __init__(self, base: Switchable, configurations: Sequence[Configuration],
                 seed: int) -> None:
        self.base, self.configurations = base, list(configurations)
        self.rng = random.Random(seed)
        self.left: list[Configuration] = []  # of this round

    def switch_to_next(self) -> None:
        """Take the next configuration of this round, or the first of a new one."""
        self.left = self.left or self.rng.sample(self.configurations, len(self.configurations))
        self.base.switch(self.left.pop(0))

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.switch_to_next()

    on_substep_end = on_step_begin  # several in a step: a steadier gradient at no cost


def _descend_on_logarithm(trainer: Any, parts: int) -> None:
    """Divide each part's gradient by its loss, or one of too few bits would drown the others."""
    plain = trainer.compute_loss

    def compute(*args: Any, **options: Any) -> Tensor:
        loss = plain(*args, **options)
        value = loss.detach()  # this part's share of the step's loss
        # The logged value stays; the gradient is that of the loss's logarithm.
        return value + (loss - value) / (parts * value).clamp(min=LEAST_LOSS)

    trainer.compute_loss = compute


def train_over(base: Switchable, records: Sequence[Record],
               configurations: Sequence[Configuration], settings: TrainSettings, *,
               method: str = "coa", say_every: int = 0, callbacks: Sequence[TrainerCallback] = ()
               ) -> tuple[TrainResult, CoaLora | None]:
    """Train one adapter on a base that changes its configuration in each part of a step.

    `base` is fresh and gets the adapter, which is also returned if it has a network. `method`:
    "lora", plain; "paper", with the paper's network; "coa", also with owned components, which
    start from the quantisation error. A `Switching` in `callbacks` replaces the default one.
    """
    require(process_count() == 1, "it takes one process: start it without `accelerate launch`")
    require(method in METHODS, f"unknown method {method!r}: use one of {', '.join(METHODS)}")
    require(settings.mode == "lora" and set(settings.modules) == set(MODULE_KINDS),
            "train over configurations with mode lora and targets aggressive")
    seed_everything(settings.seed)
    roots = []
    if method == "coa":  # on the model as it is, before it gets the adapter
        roots = input_roots(base.model, base.layers.names, records[:WEIGHED_BY], name=base.name)
    with scratch() as work:
        trainer = make_trainer(base.model, load_tokenizer(base.name), records, settings,
                               work=work, say_every=say_every)
        trainer.args.save_strategy = "no"
        coa = None
        if method != "lora":
            network = MixingNetwork(base.layers, settings.rank, owned=OWNED if roots else 0)
            coa = CoaLora(trainer.model, base, network)
            start_owned(coa, roots)
        if len(configurations) > 1:
            _descend_on_logarithm(trainer, settings.accumulate)
        if not any(isinstance(callback, Switching) for callback in callbacks):
            callbacks = (Switching(base, configurations, settings.seed), *callbacks)
        for callback in callbacks:
            trainer.add_callback(callback)
        del roots  # 400 MB for the embedded model
        release_memory()
        return run_trainer(trainer, settings), coa


def set_components(layer: torch.nn.Module, rows: range, b: Tensor, a: Tensor) -> None:
    """Make some components of (alpha / r) B A the product of the given B and A."""
    part, factor = layer.scaling[NAME] ** -0.5, layer.lora_A[NAME]
    weight = learned_a(layer) if hasattr(factor, "parametrizations") else factor.weight
    weight.data[rows] = (part * a).to(weight)
    layer.lora_B[NAME].weight.data[:, rows] = (part * b).to(weight)


@torch.no_grad()
def start_owned(coa: CoaLora, roots: Sequence[Tensor]) -> None:
    """The components owned by layers of 2 bits start from their mean error in `best_formats`.

    The rows of A without an owner grow by sqrt(r / their number): a step moves B A by the sum
    of |a|^2 over them, so they learn as fast as all r would.
    """
    base, rank, owned = coa.base, coa.network.rank, coa.network.owned
    formats, shared = [fmt for fmt in best_formats() if fmt.bits == 2], rank - owned
    for index, layer in enumerate(coa.lora_layers.values() if owned else ()):
        learned_a(layer).data[:shared] *= (rank / shared) ** 0.5
        mean = sum(base.weight(index, fmt) for fmt in formats) / len(formats)
        factors = low_rank(base.weight(index) - mean, roots[index], owned)
        set_components(layer, range(shared, rank), *factors)
