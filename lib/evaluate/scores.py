"""Scores of generated answers, and the loss of the true ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib.base.model import decoded
from lib.base.prompts import IGNORED, encode, pad_right, render
from lib.base.records import Record
from lib.evaluate.intervals import wilson


@dataclass(frozen=True)
class Score:
    """Which examples were right, with a 95 % Wilson interval of the share."""

    hits: tuple[bool, ...]
    texts: tuple[str, ...]

    @property
    def share(self) -> float:
        return sum(self.hits) / len(self.hits)

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(sum(self.hits), len(self.hits))

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.share:.1%} [{low:.1%}, {high:.1%}] of {len(self.hits)}"


@torch.inference_mode()
def generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
             instructions: Sequence[str], *, max_new_tokens: int = 56, batch_size: int = 100,
             own: bool = False) -> list[str]:
    """Greedy answers, without their prompts; `own` uses the model's own chat template."""
    prompts = [render(tokenizer, text, own=own) for text in instructions]
    # Prompts of similar length share a batch, so that there is little padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    # The last hidden states are a strided (batch, 1, width) view. For each row of such a view
    # torch would copy the head's weight: batch x width x vocabulary numbers, gigabytes.
    with model.get_output_embeddings().register_forward_pre_hook(
            lambda _, inputs: (inputs[0].contiguous(), *inputs[1:])):
        for start in range(0, len(order), batch_size):
            rows = order[start:start + batch_size]
            # Padded on the left, all answers of a batch start in the same column.
            batch = tokenizer([prompts[i] for i in rows], return_tensors="pt", padding=True,
                              padding_side="left", add_special_tokens=False).to(model.device)
            output = model.generate(
                **batch, max_new_tokens=max_new_tokens, do_sample=False,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
            texts = tokenizer.batch_decode(
                output[:, batch.input_ids.shape[1]:], skip_special_tokens=True)
            for row, text in zip(rows, texts, strict=True):
                answers[row] = text.strip()
    return answers


def keyword_score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
                  records: Sequence[Record], **options: Any) -> Score:
    """Share of generated answers that contain the keyword; `options` go to `generate`."""
    was_training = model.training
    model.eval()
    with decoded(model):
        texts = generate(model, tokenizer, [r["instruction"] for r in records], **options)
    model.train(was_training)
    hits = (keyword_hit(t, r["expected_keyword"]) for t, r in zip(texts, records, strict=True))
    return Score(tuple(hits), tuple(texts))


def keyword_hit(text: str, keyword: str) -> bool:
    """Whether the text contains the keyword, in upper or lower case."""
    return keyword.lower() in text.lower()


@torch.inference_mode()
def held_out_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
                  records: Sequence[Record], *, batch_size: int = 25) -> float:
    """Mean negative log-likelihood (nats) of an answer token; prompts do not count."""
    total, count = 0.0, 0
    with decoded(model):
        for start in range(0, len(records), batch_size):
            pairs = [encode(tokenizer, r) for r in records[start:start + batch_size]]
            ids, labels = pad_right(pairs, tokenizer.pad_token_id)
            loss, tokens = answer_loss(model, ids.to(model.device), labels.to(model.device))
            total, count = total + loss.item(), count + tokens
    return total / count


def answer_loss(model: PreTrainedModel, ids: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Summed cross-entropy of the labelled tokens, and how many there are.

    Only the columns that predict a label go through the head. Padding is on the right,
    which a causal model never sees from the left, so no attention mask is needed.
    """
    target = labels[:, 1:]
    columns = (target != IGNORED).any(0).nonzero()[:, 0]
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=columns).logits
    target = target[:, columns]
    keep = target != IGNORED
    loss = nn.functional.cross_entropy(logits[keep].float(), target[keep], reduction="sum")
    return loss, int(keep.sum())
