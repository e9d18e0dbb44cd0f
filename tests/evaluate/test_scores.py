"""lib.evaluate.scores: greedy answers, scores, losses."""

from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from lib.base.model import pad_right
from lib.base.records import IGNORED, encode, render, sensors
from lib.evaluate.scores import (
    Score,
    answer_loss,
    generate,
    held_out_loss,
    keyword_score,
    wilson,
)


def test_score_says_share_and_interval() -> None:
    score = Score((True, False, True, True), ("a", "b", "c", "d"))
    assert score.share == 0.75 and score.interval == wilson(3, 4)
    assert str(score) == "75.0% [30.1%, 95.4%] of 4"


class Stub(torch.nn.Module):
    """Answers every prompt with the prompt if `echo`, else with the same text."""

    device, config = torch.device("cpu"), PretrainedConfig()

    def __init__(self, tokenizer: PreTrainedTokenizerBase, answer: str, *, echo: bool = False
                 ) -> None:
        super().__init__()
        self.tail = tokenizer(answer + tokenizer.eos_token, return_tensors="pt",
                              add_special_tokens=False).input_ids
        self.echo = echo
        self.calls: list[dict[str, Any]] = []

    def get_output_embeddings(self) -> torch.nn.Module:
        return torch.nn.Identity()

    def generate(self, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        self.calls.append(options | {"training": self.training})
        tail = input_ids if self.echo else self.tail.expand(len(input_ids), -1)
        return torch.cat([input_ids, tail], 1)


def test_the_prompt_is_never_searched(tokenizer: PreTrainedTokenizerBase) -> None:
    records = [{"instruction": "Is it a leak or an overload?", "expected_keyword": "leak"},
               {"instruction": "leak leak leak", "expected_keyword": "leak"}]
    for answer, hit in (("It is a LEAK.", True), ("overload", False)):
        model = Stub(tokenizer, answer).train(hit)
        score = keyword_score(model, tokenizer, records)
        assert score.hits == (hit, hit) and score.texts == (answer, answer)
        # It answers in evaluation mode, and the mode is restored.
        assert model.training is hit and [c["training"] for c in model.calls] == [False]


def test_generate_is_greedy_and_keeps_the_order(tokenizer: PreTrainedTokenizerBase) -> None:
    """Batches are sorted by length inside; the answers come in the order of the questions."""
    questions = ["a much longer question than the others are, by far", "b", "c c c c c"]
    for size, batches in ((1, 3), (2, 2), (50, 1)):
        model = Stub(tokenizer, "", echo=True)
        answers = generate(model, tokenizer, questions, max_new_tokens=7, batch_size=size)
        prompts = [tokenizer(render(tokenizer, q), add_special_tokens=False)
                   for q in questions]
        assert answers == [tokenizer.decode(p.input_ids, skip_special_tokens=True).strip()
                           for p in prompts]
        options = {"do_sample": False, "max_new_tokens": 7, "training": True,
                   "eos_token_id": [tokenizer.eos_token_id], "pad_token_id": tokenizer.pad_token_id}
        assert len(model.calls) == batches
        assert all(call.items() >= options.items() for call in model.calls)


def greedy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Five tokens, one by one, without batch, padding or cache."""
    ids = tokenizer(render(tokenizer, text), return_tensors="pt",
                    add_special_tokens=False).input_ids
    start = ids.shape[1]
    while ids.shape[1] < start + 5 and ids[0, -1] != tokenizer.eos_token_id:
        with torch.no_grad():
            token = model(input_ids=ids).logits[0, -1].argmax()
        ids = torch.cat([ids, token.view(1, 1)], 1)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()


def test_left_padding_changes_no_answer(tiny: LlamaForCausalLM,
                                        tokenizer: PreTrainedTokenizerBase) -> None:
    questions = ["Short?", "A question of middling length, is it?"] + [
        r["instruction"] for r in sensors("test", 3)]
    alone = [greedy(tiny, tokenizer, text) for text in questions]
    assert generate(tiny, tokenizer, questions, max_new_tokens=5) == alone
    assert len(set(alone)) >= 3  # the prompts matter, so this test can fail


def test_the_head_gets_contiguous_input(tiny: LlamaForCausalLM,
                                        tokenizer: PreTrainedTokenizerBase) -> None:
    """A strided view makes torch copy the head's weight once for each answer."""
    seen: list[bool] = []
    head = tiny.get_output_embeddings()
    stock = head.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.is_contiguous() and x.shape[1] == 1)
        return stock(x)

    head.forward = forward
    generate(tiny, tokenizer, ["Why?", "Why not?", "When will that be?"], max_new_tokens=3)
    assert len(seen) >= 3 and all(seen)
    assert not head._forward_pre_hooks


@pytest.mark.parametrize("count", [1, 5])
def test_answer_loss_equals_transformers(tiny: LlamaForCausalLM, count: int,
                                         tokenizer: PreTrainedTokenizerBase) -> None:
    pairs = [encode(tokenizer, r) for r in sensors("test", count)]
    ids, labels = pad_right(pairs, tokenizer.pad_token_id)
    mask = torch.tensor([[1] * len(p[0]) + [0] * (ids.shape[1] - len(p[0])) for p in pairs])
    stock = tiny(input_ids=ids, attention_mask=mask, labels=labels).loss
    stock.backward()
    weight = tiny.model.layers[0].self_attn.q_proj.weight
    gradient = weight.grad.clone()
    tiny.zero_grad()
    total, tokens = answer_loss(tiny, ids, labels)
    assert tokens == (labels[:, 1:] != IGNORED).sum()
    torch.testing.assert_close(total / tokens, stock, rtol=1e-6, atol=0)
    (total / tokens).backward()
    torch.testing.assert_close(weight.grad, gradient, rtol=1e-4, atol=1e-6)


def test_held_out_loss_is_a_mean_over_tokens(tiny: LlamaForCausalLM,
                                             tokenizer: PreTrainedTokenizerBase) -> None:
    """Not over examples, and whatever the size of a batch."""
    records = sensors("test", 7)
    total, count = 0.0, 0
    for ids, labels in (encode(tokenizer, r) for r in records):
        with torch.no_grad():
            logs = tiny(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for position, label in enumerate(labels):
            if label != IGNORED:
                total, count = total - logs[position - 1, label].item(), count + 1
    losses = [held_out_loss(tiny, tokenizer, records, batch_size=n) for n in (1, 3, 50)]
    assert losses == pytest.approx([total / count] * 3, rel=1e-5)
