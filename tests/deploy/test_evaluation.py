"""`python -m lib evaluate`: systems of each kind on the same records."""

import json
import math
from pathlib import Path

import pytest
from conftest import saved_adapter
from transformers import LlamaForCausalLM

from lib.__main__ import main
from lib.base.model import load_model, load_tokenizer
from lib.base.records import Records
from lib.deploy.evaluation import Evaluation, differences, evaluate
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
    (out / "manifest.json").unlink()  # made elsewhere
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
    assert plain.scores["exact match"].hits == plain.scores["keyword"].hits == (True, True, False)
    model, tokenizer = load_model(tiny_directory), load_tokenizer(tiny_directory)
    assert plain.loss == pytest.approx(held_out_loss(model, tokenizer, records), rel=1e-5)
    tuned = evaluate(str(adapter), records, new_tokens=6)
    assert texts(tuned) != texts(plain) and tuned.loss != plain.loss
    mean, low, high = differences(plain, tuned)["loss by record"]
    assert low < mean < high
    assert mean == pytest.approx(sum(tuned.losses) / 3 - sum(plain.losses) / 3, rel=1e-4)
    export(tmp_path / "edge", adapters={"mine": adapter}, route="original", gguf_type="F32")
    with running(tmp_path / "edge", "--context", "256") as served:
        assert texts(evaluate(served.url, records, new_tokens=6)) == texts(plain)
        other = evaluate(f"{served.url}#mine", records, new_tokens=6)
        assert texts(other) == texts(tuned) and not other.losses


def test_the_command(data: Path, adapter: Path, tiny_directory: str, tmp_path: Path,
                     capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    words = ["evaluate", tiny_directory, str(adapter), "--data", str(data), "--new-tokens", "6"]
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
    assert main(["evaluate", "http://127.0.0.1:9/v1", *words[3:]]) == 2
    assert "gives no answers" in capsys.readouterr().err
