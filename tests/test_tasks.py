"""lib.tasks: reading JSONL, prompts and labels, greedy answers, scores and losses."""

import json
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from lib.errors import UserError
from lib.tasks import (
    IGNORED,
    Record,
    Score,
    answer_loss,
    chat,
    encode,
    generate,
    held_out_loss,
    keyword_hit,
    keyword_score,
    pad_right,
    read_jsonl,
    render,
    sensors,
    wilson,
)

GOOD = b'{"instruction": "a", "response": "b"}\n'


@settings(max_examples=15)
@given(st.lists(st.fixed_dictionaries({
    key: st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(str.strip)
    for key in ("instruction", "response", "extra")}), min_size=1, max_size=2))
@example([{"instruction": "a\u2028b", "response": "c\x85d\x0ce", "extra": "\x1c"}])
@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_reads_what_json_writes(tmp_path: Path, end: str, ascii_only: bool,
                                records: list[Record]) -> None:
    """Also text with Unicode's other line ends, which JSON need not escape."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(end.join(
        json.dumps(r, ensure_ascii=ascii_only) for r in records).encode())
    # White space around a text may go, as long as the text is the same.
    read = [{k: v.strip() for k, v in r.items()} for r in read_jsonl(path)]
    assert read == [{k: v.strip() for k, v in r.items()} for r in records]


def test_reads_a_byte_order_mark(tmp_path: Path) -> None:
    """Windows editors write one."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD)
    assert read_jsonl(path) == [{"instruction": "a", "response": "b"}]


def test_sensors_takes_the_first(tmp_path: Path) -> None:
    assert len(sensors("test")) == 500
    assert sensors("test", 3) == sensors("test")[:3]


def test_prompt_is_the_tutorials_form(tokenizer: PreTrainedTokenizerBase) -> None:
    assert render(tokenizer, "Why?") == "### Instruction:\nWhy?\n\n### Response:\n"
    full = tokenizer.apply_chat_template(chat("Why?", "So."), tokenize=False)
    assert full == render(tokenizer, "Why?") + "So." + tokenizer.eos_token


def test_own_template_is_the_models(tokenizer: PreTrainedTokenizerBase) -> None:
    text = render(tokenizer, "Why?", own=True)
    assert text.endswith("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n")
    assert "### " not in text


def test_pad_token_is_not_the_end_token(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.pad_token_id is not None
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def decoded_labels(tokenizer: PreTrainedTokenizerBase, record: Record) -> str:
    """Text of the labelled tokens; checks that labels repeat the ids."""
    ids, labels = encode(tokenizer, record)
    assert len(ids) == len(labels)
    assert all(label in (token, IGNORED) for token, label in zip(ids, labels, strict=True))
    return tokenizer.decode([x for x in labels if x != IGNORED])


@pytest.mark.parametrize("split", ["train", "test_phrasings"])
def test_labels_are_the_answer_and_the_end(tokenizer: PreTrainedTokenizerBase,
                                           split: str) -> None:
    for record in sensors(split, 50):
        ids, labels = encode(tokenizer, record)
        assert labels[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids) == render(
            tokenizer, record["instruction"]) + record["response"].strip() + tokenizer.eos_token
        assert decoded_labels(tokenizer, record) == record["response"].strip() + tokenizer.eos_token


# The tokenizer lacks some bytes of control characters and of ones not yet assigned.
texts = st.text(
    st.characters(codec="utf-8", max_codepoint=0xFFFF, exclude_categories=("Cc", "Cn", "Co"),
                  include_characters="\n\t"), min_size=1, max_size=30)


@given(texts, texts.filter(str.strip))
@example("a\n\n", "b  \n\n")
@example("a", "  b")
@example("a ", "- item\n    indented\n")
def test_labels_of_any_text(tokenizer: PreTrainedTokenizerBase, instruction: str,
                            response: str) -> None:
    record = {"instruction": instruction, "response": response}
    assert decoded_labels(tokenizer, record) == response.strip() + tokenizer.eos_token


@pytest.mark.parametrize("response", ["  b", "\n\n b", "\tb", " b"])
def test_labels_of_an_answer_that_starts_with_space(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, response: str
) -> None:
    """The space must not melt into the prompt's last token, or be gone from both."""
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"instruction": "a", "response": response}))
    record = read_jsonl(path)[0]
    prompt = tokenizer(render(tokenizer, "a"), add_special_tokens=False).input_ids
    ids, _ = encode(tokenizer, record)
    assert ids[:len(prompt)] == prompt  # as generation will meet it
    assert decoded_labels(tokenizer, record) == record["response"].strip() + tokenizer.eos_token


# Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
@pytest.mark.parametrize(("hits", "total", "low", "high"), [
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718), (20, 20, 0.8389, 1.0)])
def test_wilson_against_published_values(hits: int, total: int, low: float,
                                         high: float) -> None:
    assert wilson(hits, total) == pytest.approx((low, high), abs=6e-5)


@given(st.integers(1, 1000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_contains_the_share(case: tuple[int, int]) -> None:
    hits, total = case
    low, high = wilson(hits, total)
    assert 0 <= low <= hits / total + 1e-12 and hits / total - 1e-12 <= high <= 1
    mirrored = wilson(total - hits, total)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-9)


def test_wilson_of_nothing() -> None:
    with pytest.raises(UserError, match="at least one"):
        wilson(0, 0)


def test_score_says_share_and_interval() -> None:
    score = Score((True, False, True, True), ("a", "b", "c", "d"))
    assert score.share == 0.75
    assert score.interval == wilson(3, 4)
    assert str(score) == "75.0% [30.1%, 95.4%] of 4"


def test_keyword_hit() -> None:
    assert keyword_hit("Temperature high: OVERHEATING. Check.", "overheating")
    assert keyword_hit("bearing wear", "Bearing Wear")
    assert not keyword_hit("bearing, wear", "bearing wear")
    assert not keyword_hit("", "leak")


class Stub:
    """Answers every prompt with the same text, as `generate` of a model does."""

    device = torch.device("cpu")

    def __init__(self, tokenizer: PreTrainedTokenizerBase, answers: Sequence[str]) -> None:
        self.tokenizer, self.answers = tokenizer, list(answers)
        self.prompts: list[str] = []
        self.options: list[dict[str, Any]] = []
        self.training, self.modes = True, []

    def get_output_embeddings(self) -> torch.nn.Module:
        return torch.nn.Identity()

    def eval(self) -> None:
        self.training = False

    def modules(self) -> list[torch.nn.Module]:
        return []

    def train(self, mode: bool = True) -> None:
        self.training = mode

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor,
                 **options: Any) -> torch.Tensor:
        self.modes.append(self.training)
        self.options.append(options)
        end, pad = self.tokenizer.eos_token, self.tokenizer.pad_token_id
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            self.prompts.append(self.tokenizer.decode(ids[mask.bool()]))
            text = self.answers[len(self.prompts) % len(self.answers)] + end
            tail = self.tokenizer(text, add_special_tokens=False).input_ids
            rows.append(ids.tolist() + tail)
        width = max(map(len, rows))
        return torch.tensor([r + [pad] * (width - len(r)) for r in rows])


ASK = [{"instruction": "Is it a leak or an overload?", "expected_keyword": "leak"},
       {"instruction": "leak leak leak", "expected_keyword": "leak"}]


def test_score_is_of_the_model_passed(tokenizer: PreTrainedTokenizerBase) -> None:
    right, wrong = Stub(tokenizer, ["It is a LEAK."]), Stub(tokenizer, ["overload"])
    good, bad = (keyword_score(m, tokenizer, ASK) for m in (right, wrong))
    assert good.hits == (True, True) and good.texts == ("It is a LEAK.",) * 2
    # The prompts hold the keyword; the answers do not.
    assert bad.hits == (False, False) and bad.texts == ("overload",) * 2


def test_score_follows_two_real_models(tokenizer: PreTrainedTokenizerBase,
                                       make_tiny: Any) -> None:
    """One model's own answer is the keyword; another model does not say it."""
    first, second = make_tiny(), make_tiny()
    generator = torch.Generator().manual_seed(9)
    for parameter in second.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    said = generate(first, tokenizer, ["Speak."], max_new_tokens=4)[0]
    assert said
    record = [{"instruction": "Speak.", "expected_keyword": said}]
    assert keyword_score(first, tokenizer, record, max_new_tokens=4).share == 1
    assert keyword_score(second, tokenizer, record, max_new_tokens=4).share == 0


def test_score_generates_in_evaluation_mode(tokenizer: PreTrainedTokenizerBase) -> None:
    model = Stub(tokenizer, ["x"])
    for mode in (True, False):
        model.training = mode
        keyword_score(model, tokenizer, ASK)
        assert model.training is mode
    assert model.modes == [False, False]


def test_generate_is_greedy_and_takes_the_options(tokenizer: PreTrainedTokenizerBase) -> None:
    model = Stub(tokenizer, ["x"])
    generate(model, tokenizer, ["a", "b", "c"], max_new_tokens=7, batch_size=2, own=True)
    assert len(model.options) == 2
    for options in model.options:
        assert options["do_sample"] is False and options["max_new_tokens"] == 7
        assert options["eos_token_id"] == tokenizer.eos_token_id
        assert options["pad_token_id"] == tokenizer.pad_token_id
    assert sorted(model.prompts) == [render(tokenizer, t, own=True) for t in "abc"]


def test_answers_come_in_the_order_asked(tokenizer: PreTrainedTokenizerBase) -> None:
    """Batches are sorted by length inside; an echo shows that nobody notices."""
    model = Stub(tokenizer, [""])
    asked = ["a much longer question than the others are, by far", "b", "c c c c c", "d d"]

    def echo(self: Stub, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.cat([input_ids, input_ids], 1)

    model.generate = types.MethodType(echo, model)
    for size in (1, 2, 50):
        answers = generate(model, tokenizer, asked, batch_size=size)
        assert answers == [render(tokenizer, t).strip() for t in asked]


def test_left_padding_changes_no_answer(tiny: LlamaForCausalLM,
                                        tokenizer: PreTrainedTokenizerBase) -> None:
    asked = ["Short?", "A question of middling length, is it?"] + [
        r["instruction"] for r in sensors("test", 3)]
    together = generate(tiny, tokenizer, asked, max_new_tokens=5)
    alone = []
    for text in asked:
        ids = tokenizer(render(tokenizer, text), return_tensors="pt",
                        add_special_tokens=False).input_ids
        for _ in range(5):
            with torch.no_grad():
                token = tiny(input_ids=ids, logits_to_keep=1).logits[0, -1].argmax()
            ids = torch.cat([ids, token.view(1, 1)], 1)
            if token == tokenizer.eos_token_id:
                break
        start = len(tokenizer(render(tokenizer, text), add_special_tokens=False).input_ids)
        alone.append(tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip())
    assert together == alone
    assert len(set(alone)) >= 3  # the prompts matter, so this test can fail


def test_pad_right() -> None:
    ids, labels = pad_right([([5, 6], [IGNORED, 6]), ([7, 8, 9], [IGNORED, 8, 9])], 0)
    assert ids.tolist() == [[5, 6, 0], [7, 8, 9]]
    assert labels.tolist() == [[IGNORED, 6, IGNORED], [IGNORED, 8, 9]]


@pytest.mark.parametrize("count", [1, 5])
def test_answer_loss_equals_transformers(tiny: LlamaForCausalLM,
                                         tokenizer: PreTrainedTokenizerBase,
                                         count: int) -> None:
    pairs = [encode(tokenizer, r) for r in sensors("test", count)]
    ids, labels = pad_right(pairs, tokenizer.pad_token_id)
    mask = torch.tensor([[1] * len(p[0]) + [0] * (ids.shape[1] - len(p[0])) for p in pairs])
    stock = tiny(input_ids=ids, attention_mask=mask, labels=labels).loss
    stock.backward()
    gradient = tiny.model.layers[0].self_attn.q_proj.weight.grad.clone()
    tiny.zero_grad()
    total, tokens = answer_loss(tiny, ids, labels)
    assert tokens == (labels[:, 1:] != IGNORED).sum()
    torch.testing.assert_close(total / tokens, stock, rtol=1e-6, atol=0)
    (total / tokens).backward()
    torch.testing.assert_close(tiny.model.layers[0].self_attn.q_proj.weight.grad, gradient,
                               rtol=1e-4, atol=1e-6)


def test_held_out_loss_does_not_depend_on_the_batch(
    tiny: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    records = sensors("test", 7)
    losses = [held_out_loss(tiny, tokenizer, records, batch_size=n) for n in (1, 3, 50)]
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)
    # By hand: the mean over all answer tokens, not over examples.
    total, count = 0.0, 0
    for record in records:
        ids, labels = encode(tokenizer, record)
        with torch.no_grad():
            logs = tiny(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for position, label in enumerate(labels):
            if label != IGNORED:
                total, count = total - logs[position - 1, label].item(), count + 1
    assert losses[0] == pytest.approx(total / count, rel=1e-5)


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
