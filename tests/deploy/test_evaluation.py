"""`python -m lib evaluate`: systems of each kind on the same records."""

import copy
import dataclasses
import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import saved_adapter
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerBase

from lib.__main__ import main
from lib.base.model import load_model, load_tokenizer
from lib.base.records import IGNORED, Records, encode, normalised
from lib.deploy.evaluation import Evaluation, differences, divergences, evaluate, open_system
from lib.errors import UserError
from lib.evaluate.scores import generate, held_out_loss
from lib.files import read_json, write_json
from lib.quantize.gguf import export
from lib.serve.server import running

pytestmark = pytest.mark.usefixtures("float32")


@pytest.fixture(scope="module")
def adapter(_tiny: LlamaForCausalLM, tiny_directory: str,
            tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = saved_adapter(_tiny, tmp_path_factory.mktemp("evaluated") / "mine", r=8, lora_alpha=32)
    config = read_json(out / "adapter_config.json")
    (out / "manifest.json").unlink()  # made elsewhere: it does not state its route
    write_json(out / "adapter_config.json", config | {"base_model_name_or_path": tiny_directory})
    return out


@pytest.fixture
def data(tmp_path: Path, tiny_directory: str) -> Path:
    """Records whose answer the plain model gives, and one that it does not."""
    model, tokenizer = load_model(tiny_directory), load_tokenizer(tiny_directory)
    questions = ["Which?", "And then?", "Why is it so?"]
    answers = generate(model, tokenizer, questions, max_new_tokens=6)
    rows = [{"instruction": q, "response": a, "expected_keyword": a.upper()}
            for q, a in zip(questions, [*answers[:2], "No."], strict=True)]
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def texts(done: Evaluation) -> tuple[str, ...]:
    return done.scores["exact match"].texts


def test_models_adapters_and_servers(data: Path, adapter: Path, tiny_directory: str,
                                     tmp_path: Path) -> None:
    records = [*Records(data)]
    plain = evaluate(tiny_directory, records, new_tokens=6)
    assert plain.figures()["cut off"] == plain.cut == 3 and differences(plain, plain)
    assert plain.scores["exact match"].hits == plain.scores["keyword"].hits == (True, True, False)
    model, tokenizer = load_model(tiny_directory), load_tokenizer(tiny_directory)
    assert plain.loss == pytest.approx(held_out_loss(model, tokenizer, records), rel=1e-5)
    tuned = evaluate(str(adapter), records, new_tokens=6, route="original")
    assert texts(tuned) != texts(plain) and tuned.loss != plain.loss
    mean, low, high = differences(plain, tuned)["loss by record"]
    assert low < mean < high
    assert mean == pytest.approx(sum((b - a) / n for a, b, n in zip(
        plain.sums, tuned.sums, plain.counts, strict=True)) / 3, rel=1e-4)
    # Of two tokenizers only the answers as wholes can be compared.
    longer = dataclasses.replace(tuned, counts=tuple(2 * n for n in tuned.counts))
    assert differences(plain, longer)["nats by record"][0] == pytest.approx(
        (sum(tuned.sums) - sum(plain.sums)) / 3, rel=1e-4)
    export(tmp_path / "edge", adapters={"mine": adapter}, route="original", gguf_type="F32")
    with running(tmp_path / "edge", "--context", "256") as served:
        with pytest.raises(UserError, match="it serves base, mine: which one.*add #MODEL"):
            evaluate(served.url, records)
        assert texts(evaluate(f"{served.url}#base", records, new_tokens=6)) == texts(plain)
        other = evaluate(f"{served.url}#mine", records, new_tokens=6)
        assert texts(other) == texts(tuned) and other.cut == tuned.cut == 3 and not other.sums


def test_how_far_two_models_are_apart(data: Path, adapter: Path, tiny_directory: str,
                                      tmp_path: Path, tokenizer: PreTrainedTokenizerBase,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    records = [*Records(data), {"text": "All of a text counts."}]
    same = divergences(tiny_directory, tiny_directory, records)
    assert same == {"KL by record": pytest.approx([0, 0, 0], abs=1e-6), "same top": 1}
    apart = divergences(tiny_directory, str(adapter), records, route="original")
    kl, top = [], []
    models = [open_system(tiny_directory)[0], open_system(str(adapter), "original")[0]]
    for record in records:
        ids, labels = encode(load_tokenizer(tiny_directory), record)
        learned = torch.tensor(labels[1:]) != IGNORED
        with torch.no_grad():
            p, q = (m(torch.tensor([ids])).logits[0, :-1][learned].log_softmax(-1) for m in models)
        kl.append(torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True))
        top.append((p.argmax(-1) == q.argmax(-1)).float().mean())
    assert apart["KL by record"][0] == pytest.approx(float(torch.stack(kl).mean()), rel=1e-4) != 0
    assert apart["same top"] == pytest.approx(float(torch.stack(top).mean()))
    one = divergences(tiny_directory, str(adapter), records[:1], route="original")
    assert one["KL by record"] == pytest.approx([float(kl[0])], rel=1e-4)
    words = ["--data", str(data), "--divergence", "--new-tokens", "2"]
    out = ["--out", str(tmp_path / "figures.json"), "--route", "original"]
    assert main(["evaluate", f"{tiny_directory}/", str(adapter), *words, *out]) == 0
    assert "the second beside the first, 3 records\n  KL " in capsys.readouterr().out
    rows = read_json(tmp_path / "figures.json")["systems"]["the second beside the first"]
    assert len(rows["KL by record"]) == 3 and 0 <= rows["same top"] <= 1
    for more in ([], ["http://127.0.0.1:9/v1"]):
        assert main(["evaluate", tiny_directory, *more, *words]) == 2
        assert "--divergence compares two models" in capsys.readouterr().err
    # A copy with a token more, which no record has, can be compared; in another template not.
    wider, larger = load_model(tiny_directory), copy.deepcopy(tokenizer)
    larger.chat_template = load_tokenizer(tiny_directory).chat_template
    larger.add_tokens(["one more"])
    wider.resize_token_embeddings(len(larger), mean_resizing=False)
    wider.save_pretrained(tmp_path / "wider")
    larger.save_pretrained(tmp_path / "wider")
    assert divergences(tiny_directory, str(tmp_path / "wider"), records)["same top"] == 1
    (tmp_path / "wider" / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<{% endif %}")
    with pytest.raises(UserError, match="read different tokens: leave --divergence out"):
        divergences(tiny_directory, str(tmp_path / "wider"), records)


def test_the_likeliest_of_few_answers(tiny_directory: str) -> None:
    """Labels are compared by their likelihood, so a model need not write them."""
    tokenizer = load_tokenizer(tiny_directory)
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
            for q, a in itertools.product(["Good?", "And now?"], ["Yes, it is.", "No."])]
    done = evaluate(tiny_directory, rows, new_tokens=2)
    assert list(done.counts) == [
        sum(label != IGNORED for label in encode(tokenizer, row)[1]) for row in rows]
    expected = [done.sums[i] == min(done.sums[i // 2 * 2:i // 2 * 2 + 2]) for i in range(4)]
    assert list(done.scores["likeliest"].hits) == expected and sum(expected) == 2
    assert "likeliest" not in evaluate(tiny_directory, rows[:3], new_tokens=2).scores


def test_thoughts_are_not_scored(tiny_directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server leaves them out of its answers, and a folder's answer has them."""
    record = normalised({"prompt": "Warm?", "completion": "<think>\nDry.\n</think>\n\nWet.",
                         "expected_keyword": "dry"})
    for text in ("<think>\nDry.\n</think>\n\nWet.", "Wet.", "<think>Hm.</think>Wet.", "<think>Dry"):
        monkeypatch.setattr("lib.deploy.evaluation.generate", lambda *_, text=text, **__: [text])
        scores = evaluate(tiny_directory, [record]).scores
        assert (scores["exact match"].hits, scores["keyword"].hits) == (("Wet." in text,), (False,))
    rows = [normalised({"prompt": q, "completion": f"<think>{q}</think>{a}"})
            for q in "no" for a in ("Dry.", "Wet.")]  # each has its own thought
    assert "likeliest" not in evaluate(tiny_directory, rows).scores


def test_the_command(data: Path, adapter: Path, tiny_directory: str, tmp_path: Path,
                     capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    words = ["evaluate", tiny_directory, str(adapter), "--data", str(data), "--new-tokens", "6"]
    assert main(words) == 2
    assert "does not say how it was trained: name --route" in capsys.readouterr().err
    words += ["--route", "original"]
    for _ in range(2):  # the figures of before are replaced, and no other file
        assert main([*words, "--out", str(out)]) == 0
    assert main([*words, "--out", str(adapter / "adapter_config.json")]) == 2
    assert "is there, and no evaluation: name another file" in capsys.readouterr().err
    assert main([*words, "--out", str(out)]) == 0
    said, stored = capsys.readouterr().out, read_json(out)
    assert "  exact match    0.6667 [0.2077, 0.9385]" in said
    row = stored["systems"][tiny_directory]
    assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
    difference = stored["systems"]["the second less the first"]
    assert [*difference] == ["exact match", "keyword", "loss by record"]
    (tmp_path / "plain.jsonl").write_text('{"text": "All of it."}')
    assert main(["evaluate", tiny_directory, "--data", str(tmp_path / "plain.jsonl")]) == 0
    said = capsys.readouterr().out
    assert "perplexity" in said and "exact" not in said
    assert main(["evaluate", "a", "b", "c", *words[3:]]) == 2
    assert "name one system, or two" in capsys.readouterr().err
    assert main(["evaluate", "http://127.0.0.1:9/v1", *words[3:-2]]) == 2
    assert "gives no answers" in capsys.readouterr().err


def test_what_is_named_is_used_or_refused(adapter: Path, data: Path, tiny_directory: str,
                                          tmp_path: Path, tokenizer: PreTrainedTokenizerBase,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    """Mistakes in one line that names the record, the file, the option."""
    turns = [{"role": role, "content": text} for role, text in (
        ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))]
    (tmp_path / "turns.jsonl").write_text(json.dumps({"messages": turns}))
    records = [*Records(tmp_path / "turns.jsonl")]
    losses = [evaluate(tiny_directory, records, new_tokens=1, learn=learn).loss
              for learn in ("all", "last")]
    assert losses[0] != losses[1]
    (tmp_path / "bad.jsonl").write_text('{"text": "a b"}\n{"text": "<|im_end|>"}')
    folders = {name: shutil.copytree(adapter, tmp_path / name)
               for name in ("list", "revision", "pickle", "rows", "plain")}
    file = "adapter_config.json"
    write_json(folders["list"] / file, ["LORA"])
    write_json(folders["revision"] / file, read_json(adapter / file) | {"revision": "v2"})
    (folders["pickle"] / "adapter_model.safetensors").rename(
        folders["pickle"] / "adapter_model.bin")
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["one more"])
    larger.save_pretrained(folders["rows"])
    larger.save_pretrained(shutil.copytree(tiny_directory, tmp_path / "model"))
    train = ["train", "--out", str(tmp_path / "out"), "--data", str(data), "--model"]
    score = ["evaluate", "--data", str(data), "--route", "original"]
    for words, message in (
            ([*score, tiny_directory], "--route and --model are for adapters"),
            (["evaluate", tiny_directory, "--data", str(tmp_path / "bad.jsonl")],
             "bad.jsonl:2 has one token"),
            ([*train, str(folders["list"])], "is an adapter of None"),
            ([*score, str(folders["list"])], "is not a LoRA adapter"),
            ([*score, str(folders["revision"])], "names a revision of its base"),
            ([*score, str(folders["pickle"])], "adapter_model.bin, a pickle, which is not read"),
            ([*score, str(folders["rows"])], "has the id 49152, and the embedding 49152 rows"),
            ([*train, str(tmp_path / "model")], "has the id 49152, and the embedding 49152 rows")):
        assert main(words) == 2, words
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    own = copy.deepcopy(tokenizer)
    own.chat_template = None
    own.save_pretrained(folders["plain"])
    base = load_tokenizer(tiny_directory).chat_template
    assert load_tokenizer(str(folders["plain"])).chat_template == base
    (adapter / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert load_tokenizer(str(adapter)).chat_template == "{{ messages[0].content }}"
    (adapter / "chat_template.jinja").unlink()


def test_a_base_that_has_moved_can_be_named(adapter: Path, data: Path, tiny_directory: str,
                                            tmp_path: Path, capsys: pytest.CaptureFixture[str]
                                            ) -> None:
    moved = shutil.copytree(adapter, tmp_path / "moved")
    config = read_json(moved / "adapter_config.json")
    write_json(moved / "adapter_config.json",
               config | {"base_model_name_or_path": str(tmp_path / "gone")})
    words = ["evaluate", str(moved), "--data", str(data), "--route", "original", "--limit", "1"]
    assert main(words) == 2 and "gone, which is not there: put it" in capsys.readouterr().err
    assert main([*words, "--model", tiny_directory]) == 0
    own = Path(tiny_directory).name
    for name in ("./models/gone", "C:\\models\\gone", f"owner/{own}", f"unsloth/{own}-bnb-4bit"):
        write_json(moved / "adapter_config.json", config | {"base_model_name_or_path": name})
        assert main([*words, "--model", tiny_directory]) == 0
    write_json(moved / "adapter_config.json", config | {"base_model_name_or_path": "owner/other"})
    assert main([*words, "--model", tiny_directory]) == 2
    assert "or a copy so named" in capsys.readouterr().err
    assert main([*words[:1], str(adapter), *words[2:], "--model", str(tmp_path)]) == 2
    assert "not on" in capsys.readouterr().err


def test_records_that_do_not_fit(tiny_directory: str, data: Path) -> None:
    with pytest.raises(UserError, match="b:1 is longer than the model's context, 2048 tokens"):
        evaluate(tiny_directory, [{"text": "word " * 2100}], places=["b:1"])
    with pytest.raises(UserError, match="plain texts have no question"):
        evaluate("http://127.0.0.1:9/v1", [{"text": "a b"}])
    unlabelled = normalised({"prompt": "a", "completion": "b"})
    for other in ({"text": "a b"}, unlabelled):  # a figure would be of fewer records than it says
        with pytest.raises(UserError, match="evaluate them apart"):
            evaluate(tiny_directory, [*Records(data), other])
    with pytest.raises(UserError, match="no question, .*--ignore expected_keyword"):
        evaluate(tiny_directory, [{"text": "a b", "expected_keyword": "b"}])


def test_an_answer_ends_where_the_context_does(tokenizer: PreTrainedTokenizerBase) -> None:
    """GPT-2 has no position after it: asked for more, torch stops with an IndexError."""
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=24, n_embd=32, n_layer=1, n_head=2,
                        bos_token_id=None, eos_token_id=None)
    torch.manual_seed(0)  # others may repeat a space
    model = GPT2LMHeadModel(config).eval()
    alone = generate(model, tokenizer, ["Why?"], max_new_tokens=100)
    assert alone[0]  # and a longer question beside it takes nothing away
    both = generate(model, tokenizer, ["Why?", "Why not, and when?"], max_new_tokens=100)
    assert both[:1] == alone
    model.generation_config.num_return_sequences = 2
    model.generation_config.stop_strings = [alone[0][:1]]
    assert generate(model, tokenizer, ["Why?"], max_new_tokens=100) == alone


@pytest.mark.parametrize(("answer", "given", "allowed"), [
    ("yes", 0, 128), ("word " * 60, 0, 300), ("word " * 60, 40, 40), ("word " * 300, 0, 1500)])
def test_an_answer_may_be_as_long_as_the_right_one(
        tiny_directory: str, monkeypatch: pytest.MonkeyPatch, answer: str, given: int, allowed: int
        ) -> None:
    """Cut off, it would be wrong whatever it says."""
    seen = []
    monkeypatch.setattr("lib.deploy.evaluation.generate", lambda *_, max_new_tokens, **__: (
        seen.append(max_new_tokens), [answer])[1])
    record = normalised({"prompt": "a", "completion": answer})
    evaluate(tiny_directory, [record], new_tokens=given)
    assert seen == [allowed]


def test_labels_and_answers_as_people_write_them(
        tiny_directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels within labels, spaces at the end of a cell, accents in two characters."""
    rows = [normalised({"prompt": q, "completion": a, "expected_keyword": label})
            for q, a, label in (("a", "spam", "spam"), ("b", "not spam ", "not spam "),
                                ("c", "Cre\u0300me ", "cre\u0300me"))]
    for said, exact, keyword in (
            (["Spam", "not spam", "Cr\u00e8me"], (False, True, True), (True, True, True)),
            (["not spam", "not spam", "cr\u00e8me"], (False, True, False), (False, True, True))):
        monkeypatch.setattr("lib.deploy.evaluation.generate", lambda *_, said=said, **__: said)
        scores = evaluate(tiny_directory, rows).scores
        assert (scores["exact match"].hits, scores["keyword"].hits) == (exact, keyword)
    both = [normalised({"prompt": "a", "completion": "Oil, then the oil filter.",
                        "expected_keyword": label}) for label in ("oil", "oil filter")]
    monkeypatch.setattr("lib.deploy.evaluation.generate",
                        lambda *_, **__: ["Oil, then the oil filter."] * 2)
    assert evaluate(tiny_directory, both).scores["keyword"].hits == (True, True)
    monkeypatch.setattr("lib.deploy.evaluation.batch_losses", lambda *_: [(float("nan"), 1)] * 3)
    with pytest.raises(UserError, match="has a loss of nan: its weights may be damaged"):
        evaluate(tiny_directory, rows)
    with pytest.raises(UserError, match="more than 1,024 bytes: give --new-tokens"):
        evaluate("http://127.0.0.1:9/v1", [normalised({"prompt": "a", "completion": "b" * 1025})])


def test_a_thought_before_an_answer_is_not_part_of_it(
        tiny_directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Templates of models that reason write an empty one, and training teaches it."""
    said = ["<think>\n\n</think>\n\nAt 7:30.", "At <think>"]
    monkeypatch.setattr("lib.deploy.evaluation.generate", lambda *_, **__: said)
    done = evaluate(tiny_directory, [normalised({"prompt": q, "completion": "At 7:30."})
                                     for q in "ab"])
    assert done.scores["exact match"].hits == (True, False)
    other = Evaluation({"exact match": done.scores["exact match"]})
    labels = Evaluation(done.scores | {"likeliest": done.scores["exact match"]})
    assert [*differences(labels, other)] == [*differences(other, labels)] == ["exact match"]
