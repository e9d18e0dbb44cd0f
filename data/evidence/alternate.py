"""Training variants around `lib.coa.adapter.train_over`: two callbacks and another loss.

`Renewing` searches between the steps (Ye, Tang, Ngai, arXiv 2509.25214, section 4).
`StartFromError` starts a plain adapter from the quantisation error (as LQ-LoRA does, Guo et al.
2023, but without its alternation). `distilling` learns half from a teacher's distribution.
"""

import contextlib
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from lib.base.model import load_tokenizer
from lib.base.records import IGNORED, Record
from lib.coa.adapter import NAME, CoaLora, Switching
from lib.coa.configuration import Configuration, Layers, Switchable
from lib.coa.pareto import Evaluate, Evaluated, Features, Journal, front_by_segment, search
from lib.evaluate.scores import held_out_loss
from lib.quantize.correction import WEIGHED_BY, input_roots, low_rank
from lib.quantize.formats import FAMILIES
from lib.train import training

TAUGHT = 0.5  # share of the loss that a teacher gives


@dataclass(frozen=True)
class InTraining:
    """A switchable base and the model with its adapter, as a `CoaLora` has them, too."""

    base: Switchable
    model: PeftModel


def from_numbers(layers: Layers, positions: Iterable[int], family: str = "nf") -> Configuration:
    """The configuration of a family that has these `numbers`."""
    return Configuration(layers, tuple(FAMILIES[family][i] for i in positions))


def loss_with(adapter: Any, held: Sequence[Record], *, tokenizer: Any = None, family: str = "nf",
              learn: str = "all") -> Evaluate:
    """The held-out loss of a configuration's numbers with an adapter (`base`, `model`) as it is."""
    base, tokenizer = adapter.base, tokenizer or load_tokenizer(adapter.base.name)

    def evaluate(positions: Tensor) -> float:
        base.switch(from_numbers(base.layers, positions.tolist(), family))
        return held_out_loss(adapter.model, tokenizer, held, learn=learn)

    return evaluate


def renewed(adapter: CoaLora | InTraining, configurations: Sequence[Configuration], *,
            features: Features, held: Sequence[Record], evaluations: int, seed: int = 0
            ) -> list[Configuration]:
    """The training set after a search with the adapter as it is now.

    All configurations are measured again, because the adapter has changed. The best of each
    segment, old and new, are the next training set.

    Args:
        held: examples that are used neither for training nor for testing.
    """
    evaluate, training = loss_with(adapter, held), adapter.model.training
    adapter.model.eval()
    start = Evaluated.at(torch.stack([c.numbers for c in configurations]), features, evaluate,
                         Journal())
    evaluated = search(start, features, evaluate, evaluations=evaluations, seed=seed)
    adapter.model.train(training)
    return [from_numbers(adapter.base.layers, evaluated.configurations[i].tolist())
            for i in front_by_segment(evaluated.points)]


class Renewing(Switching):
    """Renews the training set before the given steps; `options` go to `renewed`."""

    def __init__(self, base: Switchable, configurations: Sequence[Configuration], seed: int, *,
                 at: Container[int], **options: Any) -> None:
        super().__init__(base, configurations, seed)
        self.at, self.options = at, {"seed": seed} | options

    def on_step_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Search first, where it is time."""
        if state.global_step in self.at:
            adapter = InTraining(self.base, objects["model"])
            self.configurations = renewed(adapter, self.configurations, **self.options)
            self.left = []
        self.base.switch(self.next())


class StartFromError(TrainerCallback):
    """Starts a plain adapter from the low-rank part of one configuration's error.

    Args:
        records: those that training starts with; the error is weighted by their inputs.
    """

    def __init__(self, base: Switchable, configuration: Configuration,
                 records: Sequence[Record]) -> None:
        self.base, self.configuration = base, configuration
        # Before training, so that they belong to the original weights.
        self.roots = input_roots(base.model, base.layers.names, records[:WEIGHED_BY],
                                 tokenizer=load_tokenizer(base.name))

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Write the adapter's first values."""
        start_from_error(objects["model"], self.base, self.configuration, self.roots)


@torch.no_grad()
def start_from_error(model: PeftModel, base: Switchable, configuration: Configuration,
                     roots: Sequence[Tensor]) -> None:
    """Set all of an adapter to the low-rank part of the error W - Q(W)."""
    pairs = zip(configuration.layers.names, configuration.formats, strict=True)
    for index, (name, fmt) in enumerate(pairs):
        layer = model.get_submodule(f"base_model.model.{name}")
        error = base.weight(index) - base.weight(index, fmt)
        b, a = low_rank(error, roots[index], layer.r[NAME])
        part = layer.scaling[NAME] ** -0.5  # so that (alpha / r) B A is their product
        layer.lora_A[NAME].weight.data.copy_(part * a)
        layer.lora_B[NAME].weight.data.copy_(part * b)


@contextlib.contextmanager
def distilling(teacher: PreTrainedModel) -> Iterator[None]:
    """Train in the block on (1 - s) cross-entropy + s KL(teacher || model), s = TAUGHT.

    Both are summed over the learned tokens (Hinton et al. 2015, at temperature 1).
    """
    def loss(model: Any, ids: Tensor, labels: Tensor) -> tuple[Tensor, int]:
        target = labels[:, 1:]
        columns = (target != IGNORED).any(0).nonzero()[:, 0]
        target = target[:, columns]
        keep = target != IGNORED

        def logits(one: Any) -> Tensor:
            output = one(input_ids=ids, use_cache=False, logits_to_keep=columns)
            return output.logits[keep].float()

        own = logits(model)
        with torch.no_grad():
            aim = logits(teacher).log_softmax(-1)
        hard = nn.functional.cross_entropy(own, target[keep], reduction="sum")
        soft = nn.functional.kl_div(own.log_softmax(-1), aim, reduction="sum", log_target=True)
        return (1 - TAUGHT) * hard + TAUGHT * soft, int(keep.sum())

    with mock.patch.object(training, "answer_loss", loss):
        yield
