"""Search and joint training in turn (Ye, Tang, Ngai, arXiv 2509.25214, section 4)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lib.base_model import load_tokenizer
from lib.coa import CoaLora
from lib.configuration import Configuration
from lib.pareto import kept
from lib.search import Evaluate, Found, Journal, search
from lib.surrogate import Features, numbers, plan_of
from lib.tasks import Record, held_out_loss


def loss_with(coa: CoaLora, held: Sequence[Record]) -> Evaluate:
    """The loss of a plan (level numbers) with the adapter as it is, on the same examples."""
    tokenizer = load_tokenizer(coa.base.name)

    def evaluate(plan: Tensor) -> float:
        coa.base.switch(plan_of(coa.base.layers, plan.tolist()))
        return held_out_loss(coa.model, tokenizer, held)

    return evaluate


def renewed(coa: CoaLora, plans: Sequence[Configuration], *, features: Features,
            held: Sequence[Record], evaluations: int, seed: int = 0) -> list[Configuration]:
    """The training set after a search with the adapter as it is now.

    All plans are measured anew, because the adapter has changed. The best of
    each segment, old and new, are the next training set.

    Args:
        held: examples that are neither trained on nor tested with.
    """
    evaluate, training = loss_with(coa, held), coa.model.training
    coa.model.eval()
    start = Found.at(torch.stack([numbers(p) for p in plans]), features, evaluate, Journal())
    found = search(start, features, evaluate, evaluations=evaluations, seed=seed)
    coa.model.train(training)
    return [plan_of(coa.base.layers, found.plans[i].tolist()) for i in kept(found.points)]
