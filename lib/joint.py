"""Training over many configurations, and the baselines in the same harness.

One configuration makes a dedicated adapter (QLoRA's way), many make
Shared-LoRA, many with a mixing network make CoA-LoRA. Data, steps, step and
optimizer are the same. Over many configurations the steps descend on the
logarithm of the loss. "coa" is the paper's method with a change of ours, the
components that layers of few bits own; "paper" is without it.
"""

import random
from collections.abc import Callable, Container, Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from lib.base_model import load_tokenizer, quiet, release_memory
from lib.coa import OWNED, CoaLora, MixingNetwork
from lib.configuration import KINDS, Configuration
from lib.correction import WEIGHED_BY, input_roots, start_from_error, start_owned
from lib.errors import require
from lib.processes import count
from lib.profiles import TrainSettings, seed_everything
from lib.scratch import scratch
from lib.switchable import Switchable
from lib.tasks import Record
from lib.train import TrainResult, make_trainer, run_trainer

Renew = Callable[[CoaLora | None, list[Configuration]], list[Configuration]]
METHODS = ("lora", "lq", "coa", "paper")
# Below it, nats, the gradient of the loss itself is followed again.
LEAST_LOSS = 0.02


class _Switching(TrainerCallback):
    """The next configuration for each part of an optimizer step.

    Shuffled rounds, so that all get their turn. A step that sees several
    configurations has a steadier gradient at no cost.
    """

    def __init__(self, base: Switchable, plans: Sequence[Configuration], seed: int,
                 renew: Callable[[list[Configuration]], list[Configuration]],
                 renew_at: Container[int]) -> None:
        self.base, self.plans, self.rng = base, list(plans), random.Random(seed)
        self.renew, self.renew_at = renew, renew_at
        self.left: list[Configuration] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in self.renew_at:
            self.plans, self.left = self.renew(self.plans), []
        self.on_substep_end(args, state, control)

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.left = self.left or self.rng.sample(self.plans, len(self.plans))
        self.base.switch(self.left.pop(0))


def _relative(trainer: Any, parts: int) -> None:
    """Descend on the logarithm of the loss: a step's gradient over its loss.

    A configuration that few bits have broken has a hundred times the loss of a
    good one; its steps would drown the others. The value that is logged stays.
    """
    plain = trainer.compute_loss

    def compute(*args: Any, **options: Any) -> torch.Tensor:
        loss = plain(*args, **options)
        value = loss.detach()  # this part's share of the step's loss
        return value + (loss - value) / (parts * value).clamp(min=LEAST_LOSS)

    trainer.compute_loss = compute


def train_over(base: Switchable, records: Sequence[Record], plans: Sequence[Configuration],
               settings: TrainSettings, *, method: str = "coa", say_every: int = 0,
               renew: Renew | None = None, renew_at: Container[int] = (),
               callbacks: Sequence[TrainerCallback] = ()
               ) -> tuple[TrainResult, CoaLora | None]:
    """Train one adapter on a base that is at another configuration in each part of a step.

    Args:
        base: a fresh switchable model; the adapter is added to it.
        plans: the configurations; one alone gives a dedicated adapter.
        method: "lora", plain; "lq", plain and started from the low-rank part of
            the first plan's quantisation error (in the manner of LQ-LoRA, Guo
            et al. 2023, without its alternation); "paper", with the mixing
            network; "coa", with components that are owned, too, and start
            from such parts.
        renew: makes the next plans from the adapter and the plans, before the steps
            `renew_at`; `data/results/alternate.py` has one that searches for them.

    Returns:
        The run with its model, and the adapter with its network if it has one.

    Raises:
        UserError: no plans, an unknown method, bad settings or records.
    """
    require(count() == 1, "training over configurations is for one process: start it "
            "without `accelerate launch`")  # a part's own loss scales its gradient
    require(plans, "no configurations to train over: give at least one")
    require(method in METHODS, f"unknown method {method!r}: use one of {', '.join(METHODS)}")
    require(settings.mode == "lora" and set(settings.modules) == set(KINDS),
            "train over configurations with mode lora and targets aggressive")
    require(not hasattr(base.model, "peft_config"),
            "this base has an adapter already: load a fresh one")
    quiet()
    seed_everything(settings.seed)
    roots = (input_roots(base.model, base.layers.names, records[:WEIGHED_BY], name=base.name)
             if method in ("lq", "coa") else [])
    with scratch() as work:
        trainer = make_trainer(base.model, load_tokenizer(base.name), records, settings,
                               work=work, say_every=say_every)
        trainer.args.save_strategy = "no"
        coa = None
        if method in ("coa", "paper"):
            network = MixingNetwork(base.layers, settings.rank,
                                    owned=OWNED if method == "coa" else {})
            coa = CoaLora(trainer.model, base, network)
            start_owned(coa, roots)
        elif method == "lq":
            start_from_error(trainer.model, base, plans[0], roots)
        if len(plans) > 1:
            _relative(trainer, settings.accumulate)
        switching = _Switching(base, plans, settings.seed,
                               lambda now: renew(coa, now) if renew else now, renew_at)
        for callback in (switching, *callbacks):
            trainer.add_callback(callback)
        del roots  # 400 MB for the embedded model, and what making them has left
        release_memory()
        return run_trainer(trainer, settings), coa
