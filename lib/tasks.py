"""Datasets, prompts and scores: what the models learn and how it is judged."""

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib.artifacts import ROOT
from lib.base_model import release_memory
from lib.errors import require
from lib.fused import decoded
from lib.records import Record, read_jsonl

DATA = ROOT / "data"
IGNORED = -100


def sensors(split: str, limit: int | None = None) -> list[Record]:
    """Split of data/sensors: train, validation, test or test_phrasings."""
    return read_jsonl(DATA / "sensors" / f"{split}.jsonl")[:limit]


def movies(split: str, limit: int | None = None) -> list[Record]:
    """Split of data/movie_sentiment: train, validation or test, as instructions."""
    text = (DATA / "movie_sentiment" / f"{split}.jsonl").read_text(encoding="utf-8")
    return [{"instruction": f"Is this film review positive or negative?\n{row['text']}",
             "response": f"{row['label'].capitalize()}.", "expected_keyword": row["label"]}
            for row in map(json.loads, text.splitlines()[:limit])]


def chat(instruction: str, response: str | None = None) -> list[dict[str, str]]:
    """An instruction, and its answer if given, as chat messages."""
    messages = [{"role": "user", "content": instruction}]
    if response is not None:
        # A leading space would melt into the last token of the prompt.
        messages.append({"role": "assistant", "content": response.strip()})
    return messages


def render(tokenizer: PreTrainedTokenizerBase, instruction: str, *, own: bool = False) -> str:
    """Prompt text, in the course's template or in the model's `own`."""
    template = tokenizer.own_chat_template if own else None
    return tokenizer.apply_chat_template(
        chat(instruction), chat_template=template, tokenize=False,
        add_generation_prompt=True)


def encode(tokenizer: PreTrainedTokenizerBase, record: Record) -> tuple[list[int], list[int]]:
    """Token ids of prompt and answer (with the end token) and their labels."""
    full = tokenizer.apply_chat_template(
        chat(record["instruction"], record["response"]), tokenize=False)
    ids = tokenizer(full, add_special_tokens=False).input_ids
    prompt = render(tokenizer, record["instruction"])
    start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
    return ids, [IGNORED] * start + ids[start:]


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


def wilson(hits: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Score interval of a binomial share (Wilson 1927)."""
    require(total > 0, "no examples to score: give at least one")
    share = hits / total
    middle = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    instructions: Sequence[str],
    *,
    max_new_tokens: int = 56,
    batch_size: int = 100,
    own: bool = False,
) -> list[str]:
    """Greedy answers of the model that is passed, without the prompt.

    Prompts are padded on the left, so every answer starts in the same column
    and the prompt can be cut off by position.
    """
    prompts = [render(tokenizer, text, own=own) for text in instructions]
    # Neighbours in length share a batch, so that little is padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        rows = order[start:start + batch_size]
        batch = tokenizer([prompts[i] for i in rows], return_tensors="pt", padding=True,
                          padding_side="left", add_special_tokens=False).to(model.device)
        with _contiguous_head(model):
            output = model.generate(
                **batch, max_new_tokens=max_new_tokens, do_sample=False,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
        tails = tokenizer.batch_decode(
            output[:, batch.input_ids.shape[1]:], skip_special_tokens=True)
        for row, tail in zip(rows, tails, strict=True):
            answers[row] = tail.strip()
    return answers


@contextlib.contextmanager
def _contiguous_head(model: PreTrainedModel) -> Iterator[None]:
    """Give the head a copy of the last hidden states instead of a strided view.

    On a strided (batch, 1, width) input torch multiplies each row with a copy
    of the weight of its own: batch x width x vocabulary numbers, gigabytes.
    """
    def copy(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (args[0].contiguous(), *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(copy)
    try:
        yield
    finally:
        handle.remove()


def keyword_score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    **options: Any,
) -> Score:
    """Share of generated answers that contain the expected keyword.

    The prompt is never searched. `options` go to `generate`.
    """
    require(records, "no examples to score: give at least one")
    was_training = model.training
    model.eval()
    with decoded(model):
        texts = generate(model, tokenizer, [r["instruction"] for r in records], **options)
    model.train(was_training)
    release_memory()
    hits = (keyword_hit(t, r["expected_keyword"]) for t, r in zip(texts, records, strict=True))
    return Score(tuple(hits), tuple(texts))


def keyword_hit(text: str, keyword: str) -> bool:
    """The keyword stands in the text, whatever its case."""
    return keyword.lower() in text.lower()


@torch.inference_mode()
def held_out_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    *,
    batch_size: int = 25,
) -> float:
    """Mean negative log-likelihood (nats) of an answer token, prompts left out."""
    require(records, "no examples to score: give at least one")
    total, count = 0.0, 0
    with decoded(model):
        for start in range(0, len(records), batch_size):
            pairs = [encode(tokenizer, r) for r in records[start:start + batch_size]]
            ids, labels = pad_right(pairs, tokenizer.pad_token_id)
            loss, tokens = answer_loss(model, ids.to(model.device), labels.to(model.device))
            total, count = total + loss.item(), count + tokens
    release_memory()
    return total / count


def pad_right(pairs: Sequence[tuple[list[int], list[int]]], pad: int
              ) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels (batch, length), padded on the right."""
    length = max(len(ids) for ids, _ in pairs)
    rows = [ids + [pad] * (length - len(ids)) for ids, _ in pairs]
    labels = [row + [IGNORED] * (length - len(row)) for _, row in pairs]
    return torch.tensor(rows), torch.tensor(labels)


def answer_loss(model: PreTrainedModel, ids: torch.Tensor, labels: torch.Tensor
                ) -> tuple[torch.Tensor, int]:
    """Summed cross-entropy of the labelled tokens, and how many there are.

    Only the columns that predict a label go through the head. Padding is on
    the right, where a causal model never looks back from it, so no attention
    mask is needed.
    """
    target = labels[:, 1:]
    wanted = (target != IGNORED).any(0).nonzero()[:, 0]
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=wanted).logits
    target = target[:, wanted]
    keep = target != IGNORED
    loss = nn.functional.cross_entropy(logits[keep].float(), target[keep], reduction="sum")
    return loss, int(keep.sum())
