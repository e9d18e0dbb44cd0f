"""llama.cpp against transformers, one next-token distribution at a time."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import httpx
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib.base.records import IGNORED, Record, encode


@dataclass(frozen=True)
class Parity:
    """How far two engines agree over the answer tokens of some records.

    Attributes:
        positions: next-token distributions compared.
        equal: share of them with the same likeliest token.
        divergence: mean Kullback-Leibler divergence (nats) of llama.cpp's
            distribution from transformers', over the likeliest tokens of
            llama.cpp and one class for all others.
        margin: largest log-probability (nats) by which transformers
            preferred its own token where the two disagree; 0 if they never do.
    """

    positions: int
    equal: float
    divergence: float
    margin: float


def compare(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, client: httpx.Client,
            records: Sequence[Record], *, name: str = "", top: int = 50) -> Parity:
    """Teacher-forced parity: both engines see the true answer up to each token.

    Args:
        model: transformers' side, in evaluation mode.
        client: of a server, with its URL; `name` is the model or adapter there.
        top: how many of llama.cpp's likeliest tokens are compared.
    """
    equal, divergences, margins = [], [], [0.0]
    for record in records:
        ids, labels = encode(tokenizer, record)
        start = next(i for i, label in enumerate(labels) if label != IGNORED)
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids])).logits[0].float()
        for end in range(start, len(ids)):
            p = logits[end - 1].log_softmax(-1)
            q = next_tokens(client, ids[:end], name=name, top=top)
            ours, theirs = int(p.argmax()), max(q, key=q.__getitem__)
            equal.append(ours == theirs)
            margins.append(float(p[ours] - p[theirs]))
            divergences.append(_divergence(p, q))
    return Parity(len(equal), statistics.mean(equal), statistics.mean(divergences), max(margins))


def next_tokens(client: httpx.Client, ids: list[int], *, name: str = "", top: int = 50
                ) -> dict[int, float]:
    """{token id: log-probability} of the server's likeliest next tokens."""
    reply = client.post("/completions", json={
        "model": name, "prompt": ids, "max_tokens": 1, "temperature": 0, "n_probs": top})
    reply.raise_for_status()
    first = reply.json()["choices"][0]["logprobs"]["content"][0]
    return {entry["id"]: entry["logprob"] for entry in first["top_logprobs"]}


def _divergence(p: torch.Tensor, q: dict[int, float]) -> float:
    """KL(p, q) with every token that q does not name in one class."""
    tokens = torch.tensor(list(q))
    named_q = torch.tensor(list(q.values())).double().exp()
    named_p = p[tokens].double().exp()
    rest_p, rest_q = ((1 - x.sum()).clamp(min=1e-12) for x in (named_p, named_q))
    both = torch.cat([named_p, rest_p[None]]), torch.cat([named_q, rest_q[None]])
    return float((both[0] * (both[0] / both[1]).log()).sum().clamp(min=0))
