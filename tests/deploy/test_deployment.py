"""From a budget to files: sizes, what is read back, a server of several budgets, bad budgets."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import saved_adapter, with_adapter
from transformers import AutoModelForCausalLM

from data.evidence import alternate
from lib.__main__ import main
from lib.base.model import CHAT_TEMPLATE, load_model, load_tokenizer
from lib.base.records import normalised, sensors
from lib.client import ask, connect, question
from lib.coa.adapter import CoaLora, MixingNetwork
from lib.coa.configuration import (
    MODULE_KINDS,
    Configuration,
    Switchable,
    known_configurations,
)
from lib.deploy import deployment as module
from lib.deploy.deployment import FAST, Cost, Deployed, deploy
from lib.deploy.evaluation import Evaluation, evaluate
from lib.deploy.packed import load_deployed
from lib.errors import UserError
from lib.evaluate.scores import held_out_loss
from lib.files import read_json, sha256, verified, write_json, writing
from lib.quantize.correction import encode_with_feedback, input_roots
from lib.quantize.formats import FAMILIES, Format, decode
from lib.quantize.gguf import export, permute
from lib.serve.bundle import Reader, metadata
from lib.serve.server import running
from lib.train.lora import adapter_factors

pytestmark = pytest.mark.usefixtures("float32")
# Two blocks of width 64 and 49,152 rows of embedding: 3.3 MB in 8 bits.
LOW, HIGH = Format(2, 2, "bf16", 64, 256), Format(8, 8, "bf16", 16, 256)
TEMPLATE = CHAT_TEMPLATE.replace("Instruction", "Question")
RECORDS = [*map(normalised, sensors("train", 4))]
HELD = [*map(normalised, sensors("validation", 3))]


def aware(model: str, out: Path, family: str) -> Path:
    """A random configuration-aware adapter on a model."""
    base = Switchable.load(model)
    network = MixingNetwork(base.layers, 4, family=family)
    torch.nn.init.normal_(network.network[-1].weight, std=0.1)
    coa = CoaLora(with_adapter(base.model, target_modules=list(MODULE_KINDS)), base, network)
    with writing(out, **coa.facts) as part:
        coa.write(part)
    return out


@pytest.fixture(scope="module")
def packed(tiny_directory: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with a front of three configurations."""
    out = aware(tiny_directory, tmp_path_factory.mktemp("packed") / "mine", "nf")
    base = Switchable.load(tiny_directory)
    rows = [{"loss": loss, "configuration": Configuration.uniform(base.layers, fmt).to_json()}
            for fmt, loss in zip((LOW, Format(), HIGH), (9.0, 5.0, 4.0), strict=True)]
    out.joinpath("front.json").write_text(json.dumps({
        "base_hash": base.fingerprint, "adapter": sha256(out / "manifest.json"), "front": rows}))
    return out


@pytest.fixture(scope="module")
def served(tiny_directory: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = aware(tiny_directory, tmp_path_factory.mktemp("served") / "mine", "gguf")
    tokenizer = load_tokenizer(tiny_directory)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(out)
    return out


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are written, but neither asked nor timed."""
    monkeypatch.setattr(module, "measured", lambda *_: (Evaluation(), Cost(180, 8)))


def run(adapter: Path, budget: float, out: Path, **options: Any) -> Deployed:
    return deploy(adapter, [budget], out, records=RECORDS, held=HELD, **options)[budget]


def size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("budget", [6.2, 7.6, 8.5])
def test_packed_files_keep_the_budget(packed: Path, tmp_path: Path, budget: float) -> None:
    done = run(packed, budget, tmp_path / "out")
    assert done.actual_mb == pytest.approx(size(tmp_path / "out") / 1e6)
    assert done.actual_mb <= budget
    assert not list(tmp_path.glob(".*"))
    # At 6.2 MB only the 4-bit embedding fits; of the known ones the best that fits is taken.
    assert str(done.table) == "4 bits" if budget < 7 else done.configuration.formats[0] == HIGH
    # What is read back is what was measured. The adapter is stored in float16.
    tokenizer = load_tokenizer(str(tmp_path / "out"))
    loss = held_out_loss(load_deployed(tmp_path / "out"), tokenizer, HELD)
    assert loss == pytest.approx(done.loss, rel=1e-3)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("low", "budget", "kind"), [(3.5, 3.74, "Q4_0"), (5, 5.6, "Q8_0")])
def test_gguf_files_keep_the_budget(served: Path, tiny_directory: str, tmp_path: Path,
                                    low: float, budget: float, kind: str) -> None:
    done = run(served, budget, tmp_path / "out")
    assert low < done.actual_mb <= budget
    assert verified(tmp_path / "out")["name"] == "mine"
    kinds = {t.name: t.tensor_type.name
             for t in gguf.GGUFReader(tmp_path / "out/model.gguf").tensors}
    assert metadata(Reader(tmp_path / "out/model.gguf"), "tokenizer.chat_template") == TEMPLATE
    assert {*kinds.values()} <= {"F32", *FAST} and kinds["token_embd.weight"] == done.table
    # The file has the adapter of this configuration folded in, rounded with feedback.
    base = Switchable.load(tiny_directory)
    coa = CoaLora.from_pretrained(base, served)
    coa.materialise(done.configuration, tmp_path / "mine")
    name = "model.layers.1.mlp.down_proj"
    a, b, scale = adapter_factors(tmp_path / "mine")[name]
    index = base.layers.names.index(name)
    weight = base.weight(index) + scale * b @ a
    assert done.configuration.formats[index] == kind
    if kind == "Q4_0":
        base.switch(done.configuration)
        tokenizer = load_tokenizer(str(served), base=tiny_directory)  # with its own template
        root = input_roots(base.model, [name], RECORDS, tokenizer=tokenizer)
        expected = encode_with_feedback({name: weight}, {name: root[0]})[name]
        tensor = next(t for t in gguf.GGUFReader(tmp_path / "out/model.gguf").tensors
                      if t.name == "blk.1.ffn_down.weight")
        close = decode(expected, "Q4_0") - decode(tensor.data, "Q4_0")
        assert float(close.abs().mean() / weight.abs().mean()) < 0.02


def test_several_budgets_are_models_of_one_server(served: Path, tmp_path: Path) -> None:
    done = deploy(served, [3.74, 5], tmp_path / "out", records=RECORDS, held=HELD)
    assert done[3.74].actual_mb < done[5].actual_mb
    assert all(d.cost.memory_mb > d.actual_mb and d.cost.token_ms > 0 for d in done.values())
    assert len(done[5].evaluation.scores["exact match"].texts) == 3
    assert read_json(tmp_path / "out/manifest.json")["deployments"] == ["3.74mb", "5mb"]
    texts = {}
    with running(tmp_path / "out") as server, connect(server.url) as client:
        names = [row["id"] for row in client.get("/models").json()["data"]]
        assert names == ["mine@3.74mb", "mine@5mb"]
        for name in (*names, ""):
            texts[name] = ask(client, question("Which?", model=name)).text
        assert client.get("/models/mine@3.74mb").is_success
        refused = client.post("/chat/completions", json=question("Which?", model="mine"))
        assert refused.status_code == 404 and "mine@5mb" in refused.text
        assert client.get(server.url.replace("/v1", "/health")).is_success
    for name in names:  # each is the model of its folder
        with running(tmp_path / "out" / name.partition("@")[2]) as server, \
                connect(server.url) as client:
            assert ask(client, question("Which?")).text == texts[name]
    assert texts[""] == texts["mine@3.74mb"]


@pytest.mark.usefixtures("quick")
def test_a_layer_is_encoded_once_for_all_budgets(served: Path, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    real = module.encode_with_feedback

    def count(weights: dict[str, torch.Tensor], roots: Any) -> Any:
        encoded.extend(weights)
        return real(weights, roots)

    monkeypatch.setattr(module, "encode_with_feedback", count)
    # Of the layers in Q4_0 at 3.74 MB some still are at 3.76, and none at 5.
    deploy(served, [3.74, 3.76, 5], tmp_path / "out", records=RECORDS, held=HELD)
    assert encoded and len({*encoded}) == len(encoded)
    for budget in ("3.74", "5"):
        deploy(served, [float(budget)], tmp_path / budget, records=RECORDS, held=HELD)
        one, several = (f / "model.gguf" for f in (tmp_path / budget, tmp_path / f"out/{budget}mb"))
        assert one.read_bytes() == several.read_bytes()


@pytest.mark.usefixtures("quick")
def test_any_adapter(tiny_directory: str, packed: Path, tmp_path: Path) -> None:
    """A plain one, of some layers, is folded; one with another family's formats is refused."""
    plain = saved_adapter(load_model(tiny_directory, dtype=torch.float32), tmp_path / "plain",
                          target_modules=["q_proj", "v_proj"])
    assert run(plain, 5.6, tmp_path / "a", route="original").configuration.family == "gguf"
    assert run(plain, 8.5, tmp_path / "b", route="original", form="packed").loss > 0
    with pytest.raises(UserError, match="is for nf formats: leave --format"):
        run(packed, 8.5, tmp_path / "c", form="gguf")


def test_long_records_are_asked_whole(tiny_directory: str, tmp_path: Path) -> None:
    """The server's own context is 2,048 tokens; the model's limits both."""
    long = [normalised({"prompt": "word " * 2200, "completion": "Yes."})]
    adapter = saved_adapter(load_model(tiny_directory), tmp_path / "plain")
    options = {"records": long, "held": long, "route": "original"}
    with pytest.raises(UserError, match="a record has 2... tokens, and the model's context 2048"):
        deploy(adapter, [5.6], tmp_path / "out", **options)
    with pytest.raises(UserError, match="record 1 is longer than the model's context"):
        export(tmp_path / "edge", merged=adapter, gguf_type="Q4_0", route="original", records=long)
    model = shutil.copytree(tiny_directory, tmp_path / "long")
    write_json(model / "config.json",
               read_json(model / "config.json") | {"max_position_embeddings": 4096})
    adapter = saved_adapter(load_model(str(model)), tmp_path / "other")
    done = deploy(adapter, [5.6], tmp_path / "out", **options)[5.6]
    assert len(done.evaluation.scores["exact match"].texts) == 1
    with pytest.raises(UserError, match="packed files need no --converter"):
        deploy(adapter, [9], tmp_path / "new", form="packed", converter=tmp_path, **options)


@pytest.mark.usefixtures("quick")
def test_one_that_was_trained_for_a_configuration_gets_it(served: Path, tiny_directory: str,
                                                          tmp_path: Path) -> None:
    base = Switchable.load(tiny_directory)
    mixed = Configuration(base.layers, tuple(FAMILIES["gguf"]) * 2)
    CoaLora.from_pretrained(base, served).materialise(mixed, tmp_path / "one")
    done = run(tmp_path / "one", 5, tmp_path / "out", route="original")
    assert done.configuration == mixed
    with pytest.raises(UserError, match="the smallest files take"):
        run(tmp_path / "one", done.actual_mb - 0.01, tmp_path / "other", route="original")
    # On the unquantised weights it would be measured, or merged, without a word.
    with pytest.raises(UserError, match="was trained for weights of fewer bits: use"):
        evaluate(str(tmp_path / "one"), HELD, route="original")
    for words in ({"merged": tmp_path / "one"}, {"adapters": {"one": tmp_path / "one"}}):
        with pytest.raises(UserError, match="was trained for weights of fewer bits: use"):
            export(tmp_path / "edge", route="original", **words)


@pytest.mark.usefixtures("quick")
def test_a_base_that_has_moved_is_named(tiny_directory: str, tmp_path: Path) -> None:
    moved = shutil.copytree(tiny_directory, tmp_path / "base")
    adapter = aware(str(moved), tmp_path / "mine", "gguf")
    moved.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="base, which is not there: .* name where it is"):
        run(adapter, 5.6, tmp_path / "out")
    assert run(adapter, 5.6, tmp_path / "out", model=str(tmp_path / "elsewhere")).actual_mb < 5.6


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("form", ["packed", "gguf"])
def test_a_head_of_its_own_and_biases(tiny_directory: str, tmp_path: Path, form: str) -> None:
    """They would be read back as random numbers if they were not stored."""
    model = AutoModelForCausalLM.from_pretrained(tiny_directory)
    model.config.tie_word_embeddings, model.config.attention_bias = False, True
    other = type(model)(model.config)
    torch.nn.init.normal_(other.model.layers[0].self_attn.q_proj.bias)
    other.save_pretrained(tmp_path / "untied")
    load_tokenizer(tiny_directory).save_pretrained(tmp_path / "untied")
    adapter = aware(str(tmp_path / "untied"), tmp_path / "mine",
                    {"packed": "nf"}.get(form, "gguf"))
    done = run(adapter, 12, tmp_path / "out")
    assert done.actual_mb <= 12
    if form == "packed":
        state = load_deployed(tmp_path / "out").get_base_model().state_dict()
        bias, head = (state[name] for name in (
            "model.layers.0.self_attn.q_proj.base_layer.bias", "lm_head.weight"))
    else:
        tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "out/model.gguf").tensors}
        bias, head = (decode(tensors[name].data, tensors[name].tensor_type.name)
                      for name in ("blk.0.attn_q.bias", "output.weight"))
        bias = bias[permute(np.arange(64), 4).argsort()]
    plain = other.state_dict()
    for value, name in ((bias, "model.layers.0.self_attn.q_proj.bias"), (head, "lm_head.weight")):
        assert 0 <= float((value - plain[name]).norm() / plain[name].norm()) < 0.1


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("family", ["nf", "gguf"])
def test_the_missing_size_is_enough(packed: Path, served: Path, tmp_path: Path, family: str
                                    ) -> None:
    adapter = {"nf": packed, "gguf": served}[family]
    with pytest.raises(UserError, match="the smallest files take .* MB: give") as error:
        run(adapter, 1.0, tmp_path / "out")
    more = float(re.search(r"give ([\d.]+) MB", str(error.value))[1])
    assert run(adapter, 1.0 + more, tmp_path / "out").actual_mb <= 1.0 + more
    with pytest.raises(UserError, match="MB more"):
        run(adapter, 0.8 + more, tmp_path / "other")
    with pytest.raises(UserError, match="16 bits .*: use `export --type F16`"):
        run(adapter, 100, tmp_path / "other")


def test_limits_are_kept_or_refused(packed: Path, tmp_path: Path,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "measured", lambda *_: (Evaluation(), Cost(180, 8)))
    for limits in (Cost(179), Cost(token_ms=7.9)):
        with pytest.raises(UserError, match="take 180 MB of memory and 8.0 ms a token.*: lower"):
            run(packed, 8.5, tmp_path / "out", limits=limits)
        assert not list(tmp_path.iterdir())
    assert run(packed, 8.5, tmp_path / "out", limits=Cost(180, 8)).cost == Cost(180, 8)


def test_packed_files_are_measured(packed: Path, tmp_path: Path) -> None:
    done = run(packed, 8.5, tmp_path / "out")
    assert done.cost.memory_mb > done.actual_mb and done.cost.token_ms > 0
    assert done.evaluation.sums and "exact match" in done.evaluation.scores


@pytest.mark.usefixtures("quick")
def test_damaged_files_are_named(packed: Path, tmp_path: Path) -> None:
    run(packed, 8.5, tmp_path / "out")
    file = tmp_path / "out/weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"weights.safetensors is missing or damaged"):
        load_deployed(tmp_path / "out")
    with pytest.raises(UserError, match="not an artifact of this course"):
        load_deployed(tmp_path)


@pytest.mark.parametrize(("key", "value"), [
    ("adapter", "0"), ("base_hash", "0"), ("front", [{"loss": "x"}]), ("front", 3)])
def test_another_front_is_refused(packed: Path, tiny_directory: str, tmp_path: Path, key: str,
                                  value: Any) -> None:
    front = read_json(packed / "front.json") | {key: value}
    other = aware(tiny_directory, tmp_path / "other", "nf")
    if key != "adapter":
        front["adapter"] = sha256(other / "manifest.json")
    other.joinpath("front.json").write_text(json.dumps(front))
    with pytest.raises(UserError, match="is not this adapter's front .*: search again"):
        run(other, 8.5, tmp_path / "out")


def test_types_are_those_that_an_adapter_may_know() -> None:
    assert {*FAST} <= {*FAMILIES["gguf"]}


@pytest.mark.parametrize("family", ["nf", "gguf"])
def test_a_searched_front_is_what_deploy_takes(tiny_directory: str, tmp_path: Path, family: str,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that was cut off goes on; its front is of this adapter, in order, and is used."""
    base, data = shutil.copytree(tiny_directory, tmp_path / "base"), tmp_path / "mine.jsonl"
    adapter = aware(str(base), tmp_path / "mine", family)
    data.write_text("".join(json.dumps(r) + "\n" for r in sensors("train", 6)), encoding="utf-8")
    words = ["search", "--adapter", str(adapter), "--data", str(data), "--ignore",
             "device,fault", "--evaluations"]
    evaluate, left = alternate.held_out_loss, iter(range(30))

    def failing(*args: Any, learn: str) -> float:
        next(left)
        return evaluate(*args, learn=learn)

    monkeypatch.setattr(alternate, "held_out_loss", failing)
    with pytest.raises(StopIteration):
        main([*words, "3"])
    known = len((adapter / "front.jsonl").read_text().splitlines())
    assert known == 31 and not (adapter / "front.json").exists()
    left = iter(range(100))
    base.rename(tmp_path / "moved")
    assert main([*words, "3"]) == 2  # it says to name where the base is
    assert main([*words, "3", "--model", str(tmp_path / "moved")]) == 0
    (tmp_path / "moved").rename(base)
    stored = read_json(adapter / "front.json")
    base = Switchable.load(tiny_directory)
    found = known_configurations(adapter, base)
    assert stored["evaluated"] == len((adapter / "front.jsonl").read_text().splitlines()) - 1 > 31
    assert [c.bits for c, _ in found] == sorted(c.bits for c, _ in found)
    assert {c.family for c, _ in found} == {family}
    CoaLora.from_pretrained(base, adapter)
    assert main([*words, "0"]) == main([*words, "3", "--seed", "1"]) == 2  # other: refused
    assert main([*words, "3", "--seed", "-1"]) == 2
    assert read_json(adapter / "front.json") == stored


def test_a_search_needs_an_adapter_for_all_configurations(tmp_path: Path, tiny_directory: str,
                                                          capsys: pytest.CaptureFixture[str]
                                                          ) -> None:
    plain = saved_adapter(load_model(tiny_directory), tmp_path / "plain")
    for folder in (tmp_path, plain):
        assert main(["search", "--adapter", str(folder), "--data", "x.jsonl"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
