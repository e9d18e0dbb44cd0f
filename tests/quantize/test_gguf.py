"""lib.quantize.gguf: exported files, read back, and against llama.cpp itself."""

import math
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import saved_adapter
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerBase,
)

from data.evidence.tiny import tiny_model
from lib.base.embedded import embedded_gguf
from lib.base.model import CHAT_TEMPLATE
from lib.base.records import sensors
from lib.errors import UserError
from lib.files import MANIFEST, write_json, writing
from lib.quantize.formats import GGUF_TYPES, decode, encode, fitting
from lib.quantize.gguf import base_file, commands, export, permute, write_adapter, write_model
from lib.serve.bundle import BASE_KEY, Reader, metadata, model_reader, open_bundle
from lib.serve.server import running
from lib.settings import TARGETS
from lib.train.lora import load_adapter

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def lora(_tiny: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_adapter(_tiny, tmp_path_factory.mktemp("adapter") / "lora",
                         target_modules=list(TARGETS["aggressive"]))


def values(path: Path) -> dict[str, np.ndarray]:
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in Reader(path).tensors}


@given(heads=st.integers(1, 5), half=st.integers(1, 4), columns=st.integers(1, 3))
def test_permute_makes_pairs_neighbours(heads: int, half: int, columns: int) -> None:
    rows = np.arange(heads * 2 * half * columns).reshape(-1, columns)
    out = permute(rows, heads)
    for head in range(heads):
        for i in range(half):
            start = head * 2 * half
            assert (out[start + 2 * i] == rows[start + i]).all()
            assert (out[start + 2 * i + 1] == rows[start + half + i]).all()


def test_a_file_is_made_like_the_base_with_other_weights(
        tmp_path: Path, tiny: LlamaForCausalLM, tiny_gguf: Path,
        tokenizer: PreTrainedTokenizerBase) -> None:
    with torch.no_grad():
        tiny.model.layers[0].self_attn.v_proj.weight += 0.1
        tiny.model.norm.weight += 0.1
    write_model(tiny_gguf, tmp_path / "m.gguf", weights=tiny, gguf_type="F32",
                tokenizer=tokenizer)
    stored, state, reader = values(tmp_path / "m.gguf"), tiny.state_dict(), Reader(
        tmp_path / "m.gguf")
    assert len(stored) == len(state) - 1  # the head is tied
    assert np.array_equal(stored["token_embd.weight"], state["model.embed_tokens.weight"])
    assert np.array_equal(stored["blk.0.attn_v.weight"],
                          state["model.layers.0.self_attn.v_proj.weight"])
    assert np.array_equal(stored["output_norm.weight"], state["model.norm.weight"])
    weight = state[f"{Q}.weight"].numpy()
    assert not np.array_equal(stored["blk.0.attn_q.weight"], weight)
    assert np.array_equal(stored["blk.0.attn_q.weight"], permute(weight, 4))
    assert metadata(reader, "tokenizer.chat_template") == CHAT_TEMPLATE
    tokens = metadata(reader, "tokenizer.ggml.tokens")
    assert {t: i for i, t in enumerate(tokens)} == tokenizer.get_vocab()
    assert metadata(reader, "tokenizer.ggml.eos_token_id") == tokenizer.eos_token_id
    assert metadata(reader, "llama.rope.freq_base") == 10000.0



@pytest.mark.parametrize(("kind", "bits", "steps"), [
    ("F16", 16, 0), ("Q8_0", 8.5, 254), ("Q5_1", 6, 31), ("Q5_0", 5.5, 31),
    ("Q4_1", 5, 15), ("Q4_0", 4.5, 15), ("IQ4_NL", 4.5, 11), ("MXFP4", 4.25, 8)])
def test_types(tmp_path: Path, tiny: LlamaForCausalLM, tiny_gguf: Path, kind: str, bits: float,
               steps: int) -> None:
    assert write_model(tiny_gguf, tmp_path / "m.gguf", gguf_type=kind).keys() == {kind}
    tensors = {t.name: t for t in Reader(tmp_path / "m.gguf").tensors}
    one = tensors["blk.0.ffn_up.weight"]
    assert one.tensor_type.name == kind
    assert one.n_bytes * 8 / one.n_elements == bits
    assert tensors["output_norm.weight"].tensor_type.name == "F32"
    weight = tiny.model.layers[0].mlp.up_proj.weight.detach().numpy()
    error = np.abs(gguf.quants.dequantize(one.data, one.tensor_type) - weight)
    if steps:
        # Blocks of 32 along a row: at most one step, twice the largest value over `steps`.
        block = np.abs(weight.reshape(-1, 32)).max(1, keepdims=True)
        assert (error.reshape(-1, 32) <= 2.02 * block / steps).all()
        assert error.max() > 0
    else:
        assert (error <= np.abs(weight) * 2**-11 + 1e-7).all()


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "MXFP4"])
def test_the_engine_rounds_as_the_gguf_package(kind: str) -> None:
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(3))
    weight[3] = 0
    ours, theirs = encode(weight, kind), gguf.quants.quantize(
        weight.numpy(), gguf.GGMLQuantizationType[kind])
    assert ours.tobytes() == np.ascontiguousarray(theirs).tobytes()


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_the_engine_reads_as_the_gguf_package(kind: str) -> None:
    rows = encode(torch.randn(24, 256, generator=torch.Generator().manual_seed(3)), kind)[::2]
    theirs = gguf.quants.dequantize(rows.copy(), gguf.GGMLQuantizationType[kind])
    torch.testing.assert_close(decode(rows, kind), torch.tensor(theirs), rtol=1e-6, atol=1e-7)


def test_matrices_that_are_encoded_already(tmp_path: Path, tiny: LlamaForCausalLM,
                                           tiny_gguf: Path) -> None:
    weights = {"Q4_0": (Q, tiny.get_submodule(Q).weight),
               "Q5_1": ("model.embed_tokens", tiny.model.embed_tokens.weight)}
    encoded = {name: (gguf_type, encode(weight, gguf_type))
               for gguf_type, (name, weight) in weights.items()}
    write_model(tiny_gguf, tmp_path / "m.gguf", weights=tiny, encoded=encoded)
    tensors = {t.name: t for t in Reader(tmp_path / "m.gguf").tensors}
    types = {name: t.tensor_type.name for name, t in tensors.items()}
    assert types["blk.0.attn_q.weight"] == "Q4_0" and types["token_embd.weight"] == "Q5_1"
    assert types["blk.1.attn_q.weight"] == types["blk.0.attn_k.weight"] == "Q8_0"
    # Permuted after encoding or before, the bytes are the same.
    rows = permute(tiny.get_submodule(Q).weight.detach().numpy(), 4)
    assert np.array_equal(tensors["blk.0.attn_q.weight"].data, gguf.quants.quantize(
        rows, gguf.GGMLQuantizationType.Q4_0))


@pytest.mark.parametrize(("kind", "columns", "taken"), [
    ("Q4_K", 512, "Q4_K"), ("Q4_K", 576, "Q5_0"), ("Q5_K", 576, "Q5_1"), ("Q6_K", 576, "Q8_0"),
    ("Q2_K", 576, "IQ4_NL"), ("Q8_0", 48, "F16"), ("Q6_K", 48, "F16")])
def test_rows_that_blocks_do_not_divide_take_the_type_that_llama_cpp_takes(
        kind: str, columns: int, taken: str) -> None:
    assert fitting(kind, columns) == taken
    assert decode(encode(torch.randn(2, columns), taken), taken).shape == (2, columns)


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "IQ4_NL", "Q4_K", "Q3_K", "Q2_K", "IQ3_S"])
def test_importance_lowers_the_error_that_counts(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(32, 512, generator=generator)
    importance = 100 * torch.rand(512, generator=generator) ** 4
    plain, weighed = (((decode(encode(weight, kind, importance=i), kind) - weight).square()
                       * importance).mean() for i in (None, importance))
    assert weighed < 0.95 * plain


def test_what_cannot_be_exported(tmp_path: Path, tiny: LlamaForCausalLM, tiny_gguf: Path) -> None:
    out = tmp_path / "m.gguf"
    with pytest.raises(UserError, match="GGUF type 'Q9'"):
        write_model(tiny_gguf, out, gguf_type="Q9")
    deep = tiny_model(3)
    deep.load_state_dict(tiny.state_dict(), strict=False)
    with pytest.raises(UserError, match=r"llama files have no model\.layers\.2"):
        write_model(tiny_gguf, out, weights=deep)
    with pytest.raises(UserError, match=r"adapts model\.layers\.2.*, which embedded does not"):
        write_adapter(saved_adapter(deep, tmp_path / "a"), out, tiny_gguf, tiny)
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(UserError, match=r"hold model\.embed_tokens.* in another form"):
        write_model(tiny_gguf, out, weights=tiny_model())  # other numbers in every order
    assert list(tmp_path.iterdir()) == []
    other = tmp_path / "other"
    Phi3ForCausalLM(Phi3Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0)).save_pretrained(other)
    with (pytest.raises(UserError, match="converter does not take .*tokenizer.model"),
          base_file(str(other), out)):
        pass
    with (pytest.raises(UserError, match="does not exist: name a checkout"),
          base_file(str(other), out, tmp_path)):
        pass
    assert list(tmp_path.iterdir()) == [other]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, tiny_gguf: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "m.gguf"
    out.write_bytes(b"old")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(OSError, match="No space left"):
        write_model(tiny_gguf, out)
    assert [f.name for f in tmp_path.iterdir()] == ["m.gguf"]
    assert out.read_bytes() == b"old"


@pytest.mark.parametrize("rslora", [False, True])
def test_adapter_file(tmp_path: Path, tiny: LlamaForCausalLM, tiny_gguf: Path,
                      rslora: bool) -> None:
    adapter = saved_adapter(tiny, tmp_path / "a", r=4, lora_alpha=8, use_rslora=rslora)
    write_adapter(adapter, tmp_path / "a.gguf", tiny_gguf, tiny)
    reader, stored = Reader(tmp_path / "a.gguf"), values(tmp_path / "a.gguf")
    assert metadata(reader, "general.type") == "adapter"
    # llama.cpp divides by the rank 4, so this is a scale of 2, or of 8 / sqrt(4).
    assert metadata(reader, "adapter.lora.alpha") == (16 if rslora else 8)
    assert stored["blk.0.attn_q.weight.lora_a"].shape == (4, 64)
    assert stored["blk.0.attn_q.weight.lora_b"].shape == (64, 4)
    model_reader(tiny_gguf, {"a": tmp_path / "a.gguf"})


class Engine:
    """llama.cpp in this process, asked for next-token log-probabilities."""

    def __init__(self, model: Path, lora: Path | None = None) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.verbosity = str(model), 256, 0
        params.cpuparams.n_threads = 2
        if lora:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
        self.server = xllamacpp.Server(params)

    def next_token(self, ids: list[int], top: int = 50) -> dict[int, float]:
        """{token: log-probability} of the likeliest tokens after `ids`."""
        reply = self.server.handle_completions({
            "prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": top})
        found = reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        return {entry["id"]: entry["logprob"] for entry in found}


@torch.inference_mode()
def expected(model: LlamaForCausalLM, ids: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)


@pytest.fixture
def sentences() -> Iterator[list[list[int]]]:
    generator = torch.Generator().manual_seed(5)
    yield [torch.randint(3, 49152, (n,), generator=generator).tolist() for n in (3, 17, 40)]


@pytest.mark.parametrize("adapted", [False, True])
def test_llama_cpp_computes_the_same(tiny_gguf: Path, lora: Path, tmp_path: Path,
                                     make_tiny: Callable[[], LlamaForCausalLM],
                                     sentences: list[list[int]], adapted: bool) -> None:
    """A wrong permutation, name, scale or rope changes these by orders more."""
    model = make_tiny()
    if adapted:
        model = load_adapter(model, lora)
        write_adapter(lora, tmp_path / "lora.gguf", tiny_gguf, make_tiny())
    engine = Engine(tiny_gguf, tmp_path / "lora.gguf" if adapted else None)
    for ids in sentences:
        wanted = expected(model, ids)
        got = engine.next_token(ids)
        assert wanted.topk(5).indices.tolist() == list(got)[:5]
        for token, logprob in got.items():
            assert math.isclose(logprob, wanted[token], abs_tol=0.02), token
    if adapted:
        plain = expected(make_tiny(), sentences[0])
        assert (expected(model, sentences[0]) - plain).abs().max() > 0.5


def test_export_and_open(tmp_path: Path, tiny_directory: str, lora: Path) -> None:
    out = tmp_path / "edge"
    export(out, gguf_type="F16", route="original", adapters={"one": lora, "two": lora},
           model=tiny_directory)
    bundle = open_bundle(out)
    assert bundle.name == "base"
    assert list(bundle.adapters) == ["one", "two"]
    assert metadata(Reader(bundle.model), BASE_KEY) == f"{tiny_directory} original"
    for options, message in (({}, "does not say its base"),
                             ({"model": tiny_directory}, "does not say how it was trained")):
        with pytest.raises(UserError, match=message):
            export(out, merged=lora, **options)
    export(out, merged=lora, model=tiny_directory, route="dequantized")  # replaces it
    assert open_bundle(out).name == "lora"
    assert open_bundle(out).adapters == {}
    with pytest.raises(UserError, match="an unmerged base: use --merge or --adapter"):
        export(out, merged=lora, adapters={"one": lora}, model=tiny_directory)
    with pytest.raises(UserError, match="route 'through_4bit'"):
        export(out, route="through_4bit", model=tiny_directory)


def test_what_one_takes_home(tmp_path: Path, tiny_directory: str, lora: Path,
                             tokenizer: PreTrainedTokenizerBase) -> None:
    """Beside the file are a card and an Ollama Modelfile; records change the rounding."""
    options = {"merged": lora, "model": tiny_directory, "route": "original", "gguf_type": "Q4_K"}
    kinds = export(tmp_path / "plain", **options)
    assert kinds.keys() == {"Q5_0"} and {"attn_q", "token_embd"} <= kinds["Q5_0"]
    export(tmp_path / "weighed", **options, records=sensors("train", 4))
    plain, weighed = (values(tmp_path / name / "model.gguf") for name in ("plain", "weighed"))
    assert not np.array_equal(plain["blk.0.ffn_up.weight"], weighed["blk.0.ffn_up.weight"])
    assert np.array_equal(plain["token_embd.weight"], weighed["token_embd.weight"])
    assert metadata(Reader(tmp_path / "plain" / "model.gguf"),
                    "tokenizer.ggml.add_bos_token") is False
    card = (tmp_path / "plain" / "README.md").read_text()
    assert card.startswith("# lora\n") and "Q5_0: attn_k" in card and "## Adapter lora" in card
    own = (tmp_path / "plain" / "Modelfile").read_text()
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "{{ .Prompt }}"}],
                                          tokenize=False, add_generation_prompt=True)
    assert own.startswith("FROM ./model.gguf\nTEMPLATE \"\"\"{{ if .System }}{{ .System }}")
    assert f"{{{{ else }}}}{asked}{{{{end}}}}{{{{ .Response }}}}<|im_end|>" in own
    assert own.endswith('PARAMETER stop "<|im_end|>"\n')
    assert commands(tmp_path / "plain")[2] == (
        f"ollama create plain -f {tmp_path / 'plain' / 'Modelfile'}")
    (tmp_path / "plain").rename(tmp_path / "a b")
    assert commands(tmp_path / "a b")[0] == f"python -m lib serve '{tmp_path / 'a b'}'"
    chatml = shutil.copytree(lora, tmp_path / "chatml-lora")  # begins with a BOS that is not added
    (chatml / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    export(tmp_path / "chatml", **options | {"merged": chatml})
    own = (tmp_path / "chatml" / "Modelfile").read_text()
    assert "{{ else }}<|im_start|>user\n{{ .Prompt }}<|im_end|>\n<|im_start|>assistant\n" in own
    dated = shutil.copytree(lora, tmp_path / "dated-lora")  # Ollama would always say one date
    (dated / "chat_template.jinja").write_text("{{ strftime_now('%Y') }}" + CHAT_TEMPLATE)
    export(tmp_path / "dated", **options | {"merged": dated})
    assert not (tmp_path / "dated" / "Modelfile").exists()
    assert len(commands(tmp_path / "dated")) == 2


def test_a_folder_without_weights(tmp_path: Path) -> None:
    """The converter takes it, and its file has no tensors."""
    empty = gguf.GGUFWriter(tmp_path / "empty.gguf", "llama")
    empty.write_header_to_file()
    empty.write_kv_data_to_file()
    empty.write_tensors_to_file()
    empty.close()
    with pytest.raises(UserError, match="mine has no weights: save it again"):
        write_model(tmp_path / "empty.gguf", tmp_path / "out.gguf", base="mine")


def test_base_and_route_follow_from_the_adapter(
        tmp_path: Path, tiny_directory: str, lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge into another base, or into the other form of it, is far off and looks fine."""
    def trained(name: str, base: str, mode: str) -> Path:
        with writing(tmp_path / name, base=base, settings={"mode": mode}) as part:
            for file in lora.glob("adapter_*"):
                (part / file.name).write_bytes(file.read_bytes())
        return tmp_path / name

    qlora, plain = (trained(mode, tiny_directory, mode) for mode in ("qlora", "lora"))
    for adapter, route in ((qlora, "dequantized"), (plain, "original")):
        export(tmp_path / "out", adapters={"one": adapter}, gguf_type="F16")
        bundle = open_bundle(tmp_path / "out")
        assert metadata(Reader(bundle.model), BASE_KEY) == f"{tiny_directory} {route}"
    base = shutil.copytree(tiny_directory, tmp_path / "base")
    write_json(base / MANIFEST, {"files": {f.name: "" for f in base.iterdir()}, "versions": {}})
    before = sorted(base.iterdir())
    with pytest.raises(UserError, match="base holds .*, which is read here: choose another"):
        export(base, merged=trained("of-base", str(base), "lora"))
    assert sorted(base.iterdir()) == before
    monkeypatch.chdir(plain)  # "." has no name of its own
    export(tmp_path / "here", merged=Path("."), gguf_type="F16")
    assert open_bundle(tmp_path / "here").name == plain.name
    monkeypatch.chdir(tmp_path / "here")
    assert open_bundle(Path(".")).name == plain.name
    other = trained("other", "somebody/else", "lora")
    for options, message in (
            ({"merged": other, "model": tiny_directory}, "somebody/else, not on .*tiny: name"),
            ({"merged": qlora, "model": "embedded"}, "tiny, not on embedded: name its base"),
            ({"merged": qlora, "route": "original"}, "on the dequantized weights, not on the orig"),
            ({"adapters": {"a": qlora, "b": plain}}, "weights: export them apart")):
        with pytest.raises(UserError, match=message):
            export(tmp_path / "new", **options)
    with pytest.raises(UserError, match="is an adapter of None: name its base"):
        export(tmp_path / "new", model=str(saved_adapter(tiny_model(), tmp_path / "bare")))
    assert not (tmp_path / "new").exists()


def test_files_that_are_refused(tmp_path: Path, lora: Path, tiny_gguf: Path,
                                tiny: LlamaForCausalLM) -> None:
    f32, good = tiny_gguf, tmp_path / "lora.gguf"
    write_adapter(lora, good, tiny_gguf, tiny)
    with pytest.raises(UserError, match="does not exist"):
        open_bundle(tmp_path / "none.gguf")
    with pytest.raises(UserError, match="not an artifact of this course"):
        open_bundle(lora.parent)
    whole = f32.read_bytes()
    for size in (0, 3, 20, 1000, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(UserError, match="not a whole GGUF file"):
            open_bundle(tmp_path / "cut.gguf")
    (tmp_path / "cut.gguf").write_bytes(whole.replace(  # a vocabulary of 2^63 tokens
        struct.pack("<IIQ", 9, 8, 49152), struct.pack("<IIQ", 9, 8, 1 << 63)))
    with pytest.raises(UserError, match="not a whole GGUF file"):
        open_bundle(tmp_path / "cut.gguf")
    (tmp_path / "text.gguf").write_text("not a model " * 100)
    with pytest.raises(UserError, match="not a whole GGUF file"):
        open_bundle(tmp_path / "text.gguf")
    with pytest.raises(UserError, match="is an adapter: name a model"):
        open_bundle(good)
    for architecture, keys in (("clip", ()), ("qwen3", ("context_length", "pooling_type"))):
        writer = gguf.GGUFWriter(tmp_path / "other.gguf", architecture)  # for pictures; embeddings
        for key in keys:
            writer.add_uint32(f"{architecture}.{key}", 1)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        with pytest.raises(UserError, match="other.gguf is not a language model, or not the first"):
            open_bundle(tmp_path / "other.gguf")
    with pytest.raises(UserError, match="use NAME=FILE"):
        open_bundle(f32, ["adapter"])
    with pytest.raises(UserError, match="has the model's name"):
        open_bundle(f32, [f"tiny={good}"])
    assert open_bundle(f32, [f"x={good}:-0.5"]).adapters == {"x": (good, -0.5)}


def test_adapters_that_do_not_fit(tmp_path: Path, tiny: LlamaForCausalLM,
                                  tiny_gguf: Path) -> None:
    f32 = tmp_path / "f32.gguf"
    write_model(tiny_gguf, f32, gguf_type="F32")
    adapter = saved_adapter(tiny, tmp_path / "a", r=4)
    other = tmp_path / "other.gguf"
    write_adapter(adapter, other, tiny_gguf, tiny, base="another model")
    with pytest.raises(UserError, match="made for 'another model', not 'embedded'"):
        open_bundle(f32, [f"x={other}"])


def test_an_adapter_of_two_ranks_is_refused(tmp_path: Path, tiny: LlamaForCausalLM, tiny_gguf: Path,
                                            tokenizer: PreTrainedTokenizerBase) -> None:
    """Another rank is no fault; two ranks in one layer are, and the engine says so."""
    f32, other = tmp_path / "f32.gguf", tmp_path / "other.gguf"
    write_model(tiny_gguf, f32, gguf_type="F32", tokenizer=tokenizer)
    write_adapter(saved_adapter(tiny, tmp_path / "c", r=7), other, tiny_gguf, tiny)
    assert "x" in open_bundle(f32, [f"x={other}"]).adapters
    a, b = values(other)["blk.0.attn_q.weight.lora_a"], np.zeros((64, 5), np.float32)
    writer = gguf.GGUFWriter(other, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 7)
    writer.add_tensor("blk.0.attn_q.weight.lora_a", a)
    writer.add_tensor("blk.0.attn_q.weight.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="failed to apply lora adapter"), running(
            f32, "--lora", f"x={other}"):
        pass


def test_the_quick_reader_reads_what_ggufs_own_reads() -> None:
    with embedded_gguf() as path:
        theirs, ours = gguf.GGUFReader(path), Reader(path)
        assert list(ours.fields) == list(theirs.fields)
        for key, field in theirs.fields.items():
            assert ours.fields[key].contents() == field.contents(), key
            assert ours.fields[key].types == field.types
        tensors = [[(t.name, tuple(t.shape), t.data_offset) for t in reader.tensors]
                   for reader in (ours, theirs)]
        assert tensors[0] == tensors[1]
