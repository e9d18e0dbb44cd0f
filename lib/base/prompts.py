"""Records as token ids: the prompt, the answer, and which tokens are learned."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from lib.base.records import Record

IGNORED = -100  # the label of a token that is not learned


def chat(instruction: str, response: str | None = None) -> list[dict[str, str]]:
    """Chat messages of an instruction and, if given, its answer."""
    messages = [{"role": "user", "content": instruction}]
    if response is not None:
        # A leading space would merge with the last token of the prompt.
        messages.append({"role": "assistant", "content": response.strip()})
    return messages


def render(tokenizer: PreTrainedTokenizerBase, instruction: str, *, own: bool = False) -> str:
    """Prompt text in the course's template or, if `own`, in the model's."""
    return tokenizer.apply_chat_template(
        chat(instruction), chat_template=tokenizer.own_chat_template if own else None,
        tokenize=False, add_generation_prompt=True)


def encode(tokenizer: PreTrainedTokenizerBase, record: Record) -> tuple[list[int], list[int]]:
    """Token ids of prompt and answer (with the end token), and their labels."""
    text = tokenizer.apply_chat_template(
        chat(record["instruction"], record["response"]), tokenize=False)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    prompt = render(tokenizer, record["instruction"])
    start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
    return ids, [IGNORED] * start + ids[start:]


def pad_right(pairs: Sequence[tuple[list[int], list[int]]], pad: int
              ) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels (batch, length), padded on the right."""
    length = max(len(ids) for ids, _ in pairs)
    rows = [ids + [pad] * (length - len(ids)) for ids, _ in pairs]
    labels = [row + [IGNORED] * (length - len(row)) for _, row in pairs]
    return torch.tensor(rows), torch.tensor(labels)
