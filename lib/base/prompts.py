"""Records as token ids: the prompt, the answer, and which tokens are learned."""

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lib.base.records import Record, normalised
from lib.errors import UserError, require

IGNORED = -100  # the label of a token that is not learned
# Stands for the characters of a record that spell a control token: they stay text.
HIDDEN = 0xF0000


def chat(instruction: str, response: str | None = None) -> list[dict[str, str]]:
    """Chat messages of an instruction and, if given, its answer."""
    messages = [{"role": "user", "content": instruction}]
    return messages if response is None else [
        *messages, {"role": "assistant", "content": response}]


def begin(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A rendered text, after the BOS token if this tokenizer begins with one."""
    bos = tokenizer.bos_token
    has = bos and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    return bos + text if has and not text.startswith(bos) else text


def render(tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[Record], *,
           own: bool = False) -> str:
    """Text that asks for an answer: an instruction or messages in the tokenizer's chat template.

    With `own`, in the model's own template where the tokenizer has another.
    """
    messages = chat(prompt) if isinstance(prompt, str) else prompt
    return begin(tokenizer, tokenizer.apply_chat_template(
        messages, chat_template=tokenizer.own_chat_template if own else None,
        tokenize=False, add_generation_prompt=True))


def encode(tokenizer: PreTrainedTokenizerBase, record: Record, *, learn: str = "all"
           ) -> tuple[list[int], list[int]]:
    """Token ids of a record and their labels: those of the assistant's turns with their ends.

    `learn` is "all" or "last", of these turns. Of plain text all tokens are learned. UserError
    if the chat template leaves out a part of the record, or does not end an answer.
    """
    record = normalised(record)
    if "text" in record:
        end = tokenizer.eos_token or ""
        text = begin(tokenizer, record["text"].removesuffix(end) + end)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        return ids, list(ids)
    controls = sorted(tokenizer.all_special_tokens, key=len, reverse=True)
    messages = _hidden(record["messages"], controls)
    tools = _hidden(record.get("tools"), controls)

    def rendered(count: int, **options: Any) -> str:
        try:
            return begin(tokenizer, tokenizer.apply_chat_template(
                messages[:count], tools=tools, tokenize=False, **options))
        except Exception as error:  # of Jinja, or what a template raises itself
            raise UserError(f"the chat template cannot render this record ({error}): use a "
                            "model or a --template that does") from None

    whole, spans = rendered(len(messages)), []
    for part in map(str.strip, _strings([messages, tools])):
        found = part in whole or json.dumps(part, ensure_ascii=False)[1:-1] in whole
        require(found, f"the chat template leaves out {part[:60]!r}: use a model "
                "or a --template that renders it")
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and (learn == "all" or index == len(messages) - 1):
            start, text = len(rendered(index, add_generation_prompt=True)), rendered(index + 1)
            ends = [m.end() for m in _found(controls, text) if m.end() > start]
            require(ends and whole.startswith(text[:ends[-1]]), "the chat template does not end "
                    "an answer, or changes it later: use --template course or --learn last")
            spans.append((start, ends[-1]))
    return _labelled(tokenizer, whole, spans, controls)


def _found(controls: Sequence[str], text: str) -> Iterator[re.Match[str]]:
    return re.finditer("|".join(map(re.escape, controls)), text)


def _hidden(value: Any, controls: Sequence[str]) -> Any:
    """The value with each control token in its texts replaced by as many private characters."""
    if isinstance(value, dict):
        return {key: _hidden(item, controls) for key, item in value.items()}
    if isinstance(value, list):
        return [_hidden(item, controls) for item in value]
    if isinstance(value, str):
        for number, control in enumerate(controls):
            value = value.replace(control, chr(HIDDEN + number) * len(control))
    return value


def _strings(value: Any) -> list[str]:
    """Every text inside a record, but for the names of roles and types."""
    if isinstance(value, dict):
        return [s for k, item in value.items() if k not in ("role", "type") for s in _strings(item)]
    if isinstance(value, list):
        return [s for item in value for s in _strings(item)]
    return [value] if isinstance(value, str) else []


def _labelled(tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[tuple[int, int]],
              controls: Sequence[str]) -> tuple[list[int], list[int]]:
    """Ids of the text, and labels of the tokens inside the spans of characters."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoding.input_ids, encoding.offset_mapping
    cuts = {cut for span in spans for cut in span}
    if any(ord(c) >= HIDDEN for c in text) or any(
            a < cut < b for a, b in offsets for cut in cuts):
        # A token that reaches over the start of an answer is cut, as it is when one is asked.
        ids, offsets = [], []
        places = {m.start(): m.end() for m in _found(controls, text)}
        edges = sorted({0, len(text), *cuts, *places, *places.values()})
        for start, end in itertools.pairwise(edges):
            piece = text[start:end]
            for number, control in enumerate(controls):
                piece = piece.replace(chr(HIDDEN + number) * len(control), control)
            encoding = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True,
                                 split_special_tokens=places.get(start) != end)
            ids += encoding.input_ids
            offsets += [(start + a, start + b) for a, b in encoding.offset_mapping]
    return ids, [token if any(a <= left and right <= b for a, b in spans) else IGNORED
                 for token, (left, right) in zip(ids, offsets, strict=True)]


def pad_right(pairs: Sequence[tuple[list[int], list[int]]], pad: int
              ) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels (batch, length), padded on the right."""
    length = max(len(ids) for ids, _ in pairs)
    rows = [ids + [pad] * (length - len(ids)) for ids, _ in pairs]
    labels = [row + [IGNORED] * (length - len(row)) for _, row in pairs]
    return torch.tensor(rows), torch.tensor(labels)
