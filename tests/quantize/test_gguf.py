"""lib.quantize.gguf: exported files, read back, and against llama.cpp itself."""

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import saved_adapter
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase, Qwen2Config

from data.evidence.tiny import tiny_model
from lib.base.embedded import embedded_gguf
from lib.base.model import CHAT_TEMPLATE
from lib.errors import UserError
from lib.files import writing
from lib.quantize.formats import encode
from lib.quantize.gguf import export, permute, write_adapter, write_model
from lib.serve.bundle import BASE_KEY, Reader, metadata, model_reader, open_bundle
from lib.settings import TARGETS
from lib.train.lora import load_adapter

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def f32(_tiny: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_model(_tiny, path, gguf_type="F32")
    return path


@pytest.fixture(scope="module")
def lora(_tiny: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_adapter(_tiny, tmp_path_factory.mktemp("adapter") / "lora",
                         target_modules=list(TARGETS["aggressive"]))


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files without a tokenizer: reading 49,152 tokens back takes seconds a time."""
    monkeypatch.setattr("lib.quantize.gguf._tokenizer", list)


def values(path: Path) -> dict[str, np.ndarray]:
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type)
            for t in gguf.GGUFReader(path).tensors}


@given(heads=st.integers(1, 5), half=st.integers(1, 4), columns=st.integers(1, 3))
def test_permute_makes_pairs_neighbours(heads: int, half: int, columns: int) -> None:
    rows = np.arange(heads * 2 * half * columns).reshape(-1, columns)
    out = permute(rows, heads)
    for head in range(heads):
        for i in range(half):
            start = head * 2 * half
            assert (out[start + 2 * i] == rows[start + i]).all()
            assert (out[start + 2 * i + 1] == rows[start + half + i]).all()


def test_file_holds_the_model(f32: Path, _tiny: LlamaForCausalLM) -> None:
    stored, state = values(f32), _tiny.state_dict()
    assert len(stored) == len(state) - 1  # the head is tied
    assert np.array_equal(stored["token_embd.weight"], state["model.embed_tokens.weight"])
    assert np.array_equal(stored["blk.1.attn_v.weight"],
                          state["model.layers.1.self_attn.v_proj.weight"])
    weight = state[f"{Q}.weight"].numpy()
    assert not np.array_equal(stored["blk.0.attn_q.weight"], weight)
    assert np.array_equal(stored["blk.0.attn_q.weight"], permute(weight, 4))


def test_tokenizer_and_template_are_carried(f32: Path,
                                            tokenizer: PreTrainedTokenizerBase) -> None:
    reader = gguf.GGUFReader(f32)
    assert metadata(reader, "tokenizer.chat_template") == CHAT_TEMPLATE
    tokens = metadata(reader, "tokenizer.ggml.tokens")
    assert {t: i for i, t in enumerate(tokens)} == tokenizer.get_vocab()
    assert metadata(reader, "tokenizer.ggml.eos_token_id") == tokenizer.eos_token_id
    assert metadata(reader, "llama.rope.freq_base") == 10000.0


@pytest.mark.parametrize(("kind", "bits", "steps"), [
    ("F16", 16, 0), ("Q8_0", 8.5, 254), ("Q5_1", 6, 31), ("Q5_0", 5.5, 31),
    ("Q4_1", 5, 15), ("Q4_0", 4.5, 15), ("IQ4_NL", 4.5, 11), ("MXFP4", 4.25, 8)])
def test_types(bare: None, tmp_path: Path, tiny: LlamaForCausalLM, kind: str, bits: float,
               steps: int) -> None:
    write_model(tiny, tmp_path / "m.gguf", gguf_type=kind)
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
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


def test_matrices_that_are_encoded_already(bare: None, tmp_path: Path,
                                           tiny: LlamaForCausalLM) -> None:
    weights = {"Q4_0": (Q, tiny.get_submodule(Q).weight),
               "Q5_1": ("model.embed_tokens", tiny.model.embed_tokens.weight)}
    encoded = {name: (gguf_type, encode(weight, gguf_type))
               for gguf_type, (name, weight) in weights.items()}
    write_model(tiny, tmp_path / "m.gguf", encoded=encoded)
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    types = {name: t.tensor_type.name for name, t in tensors.items()}
    assert types["blk.0.attn_q.weight"] == "Q4_0" and types["token_embd.weight"] == "Q5_1"
    assert types["blk.1.attn_q.weight"] == types["blk.0.attn_k.weight"] == "Q8_0"
    # Permuted after encoding or before, the bytes are the same.
    rows = permute(tiny.get_submodule(Q).weight.detach().numpy(), 4)
    assert np.array_equal(tensors["blk.0.attn_q.weight"].data, gguf.quants.quantize(
        rows, gguf.GGMLQuantizationType.Q4_0))


def test_what_cannot_be_exported(tmp_path: Path, tiny: LlamaForCausalLM) -> None:
    out = tmp_path / "m.gguf"
    with pytest.raises(UserError, match="unknown GGUF type 'Q9'"):
        write_model(tiny, out, gguf_type="Q9")
    deep = tiny_model(3)
    with pytest.raises(UserError, match=r"GGUF has no place for model\.layers\.2.* of 2 blocks"):
        write_adapter(saved_adapter(deep, tmp_path / "a"), out, tiny.config)
    shutil.rmtree(tmp_path / "a")
    narrow = tiny.config.__class__(**tiny.config.to_dict() | {
        "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 6, "vocab_size": 49152})
    with pytest.raises(UserError, match=r"cannot be Q8_0.*use F16"):
        write_model(LlamaForCausalLM(narrow), out)
    few = tiny.config.__class__(**tiny.config.to_dict() | {"vocab_size": 100})
    with pytest.raises(UserError, match="only models with the embedded model's vocabulary"):
        write_model(LlamaForCausalLM(few), out)
    tiny.config.rope_parameters = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(UserError, match="rope scaling 'linear'"):
        write_model(tiny, out)
    tiny.config = Qwen2Config()
    with pytest.raises(UserError, match="only Llama models are exported, this is 'qwen2'"):
        write_model(tiny, out)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, tiny: LlamaForCausalLM,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "m.gguf"
    out.write_bytes(b"old")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(OSError, match="No space left"):
        write_model(tiny, out)
    assert [f.name for f in tmp_path.iterdir()] == ["m.gguf"]
    assert out.read_bytes() == b"old"


@pytest.mark.parametrize("rslora", [False, True])
def test_adapter_file(bare: None, tmp_path: Path, tiny: LlamaForCausalLM,
                      rslora: bool) -> None:
    adapter = saved_adapter(tiny, tmp_path / "a", r=4, lora_alpha=8, use_rslora=rslora)
    write_adapter(adapter, tmp_path / "a.gguf", tiny.config)
    reader, stored = gguf.GGUFReader(tmp_path / "a.gguf"), values(tmp_path / "a.gguf")
    assert metadata(reader, "general.type") == "adapter"
    # llama.cpp divides by the rank 4, so this is a scale of 2, or of 8 / sqrt(4).
    assert metadata(reader, "adapter.lora.alpha") == (16 if rslora else 8)
    assert stored["blk.0.attn_q.weight.lora_a"].shape == (4, 64)
    assert stored["blk.0.attn_q.weight.lora_b"].shape == (64, 4)
    model_reader(_saved(tiny, tmp_path / "m.gguf"), {"a": tmp_path / "a.gguf"})


def _saved(model: LlamaForCausalLM, path: Path, base: str = "embedded") -> Path:
    write_model(model, path, gguf_type="Q8_0", base=base)
    return path


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
def test_llama_cpp_computes_the_same(f32: Path, lora: Path, tmp_path: Path,
                                     make_tiny: Callable[[], LlamaForCausalLM],
                                     sentences: list[list[int]], adapted: bool) -> None:
    """A wrong permutation, name, scale or rope changes these by orders more."""
    model = make_tiny()
    if adapted:
        model = load_adapter(model, lora)
        write_adapter(lora, tmp_path / "lora.gguf", model.config)
    engine = Engine(f32, tmp_path / "lora.gguf" if adapted else None)
    for ids in sentences:
        wanted = expected(model, ids)
        got = engine.next_token(ids)
        assert wanted.topk(5).indices.tolist() == list(got)[:5]
        for token, logprob in got.items():
            assert math.isclose(logprob, wanted[token], abs_tol=0.02), token
    if adapted:
        plain = expected(make_tiny(), sentences[0])
        assert (expected(model, sentences[0]) - plain).abs().max() > 0.5


def test_export_and_open(bare: None, tmp_path: Path, tiny_directory: str,
                         lora: Path) -> None:
    out = tmp_path / "edge"
    export(out, gguf_type="F16", route="original", adapters={"one": lora, "two": lora},
           model=tiny_directory)
    bundle = open_bundle(out)
    assert bundle.name == "base"
    assert list(bundle.adapters) == ["one", "two"]
    assert metadata(gguf.GGUFReader(bundle.model), BASE_KEY) == f"{tiny_directory} original"
    for options, message in (({}, "does not say what it was trained on"),
                             ({"model": tiny_directory}, "does not say how it was trained")):
        with pytest.raises(UserError, match=message):
            export(out, merged=lora, **options)
    export(out, merged=lora, model=tiny_directory, route="dequantized")  # replaces it
    assert open_bundle(out).name == "lora"
    assert open_bundle(out).adapters == {}
    with pytest.raises(UserError, match="fold one in, or keep them beside it"):
        export(out, merged=lora, adapters={"one": lora}, model=tiny_directory)
    with pytest.raises(UserError, match="unknown route 'through_4bit'"):
        export(out, route="through_4bit", model=tiny_directory)


def test_base_and_route_follow_from_the_adapter(bare: None, tmp_path: Path, tiny_directory: str,
                                                lora: Path) -> None:
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
        assert metadata(gguf.GGUFReader(bundle.model), BASE_KEY) == f"{tiny_directory} {route}"
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


def test_files_that_are_refused(bare: None, tmp_path: Path, lora: Path,
                                tiny: LlamaForCausalLM) -> None:
    f32 = _saved(tiny, tmp_path / "tiny.gguf")
    good = tmp_path / "lora.gguf"
    write_adapter(lora, good, tiny.config)
    with pytest.raises(UserError, match="does not exist"):
        open_bundle(tmp_path / "none.gguf")
    with pytest.raises(UserError, match="not an artifact of this course"):
        open_bundle(lora.parent)
    whole = f32.read_bytes()
    for size in (0, 3, 20, 1000, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(UserError, match="not a whole GGUF file"):
            open_bundle(tmp_path / "cut.gguf")
    (tmp_path / "text.gguf").write_text("not a model " * 100)
    with pytest.raises(UserError, match="not a whole GGUF file"):
        open_bundle(tmp_path / "text.gguf")
    with pytest.raises(UserError, match="is an adapter: name a model"):
        open_bundle(good)
    foreign = whole.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0gptjj", 1)
    (tmp_path / "foreign.gguf").write_bytes(foreign)
    with pytest.raises(UserError, match="holds a gptjj model"):
        open_bundle(tmp_path / "foreign.gguf")
    with pytest.raises(UserError, match="is not NAME=FILE"):
        open_bundle(f32, ["adapter"])
    with pytest.raises(UserError, match="adapter x is not a LoRA file"):
        open_bundle(f32, [f"x={f32}"])
    with pytest.raises(UserError, match="has the model's name"):
        open_bundle(f32, [f"tiny={good}"])
    assert open_bundle(f32, [f"x={good}:-0.5"]).adapters == {"x": (good, -0.5)}


def test_adapters_that_do_not_fit(bare: None, tmp_path: Path, tiny: LlamaForCausalLM) -> None:
    f32 = _saved(tiny, tmp_path / "tiny.gguf")
    adapter = saved_adapter(tiny, tmp_path / "a", r=4)
    other = tmp_path / "other.gguf"
    write_adapter(adapter, other, tiny.config, base="another model")
    with pytest.raises(UserError, match="made for 'another model', the model is 'embedded'"):
        open_bundle(f32, [f"x={other}"])
    deep = tiny_model(3)
    write_adapter(saved_adapter(deep, tmp_path / "b"), other, deep.config)
    with pytest.raises(UserError, match=r"does not fit the model at blk\.2"):
        open_bundle(f32, [f"x={other}"])
    # Another rank is no fault; two ranks in one layer are.
    write_adapter(saved_adapter(tiny, tmp_path / "c", r=7), other, tiny.config)
    assert "x" in open_bundle(f32, [f"x={other}"]).adapters
    a, b = values(other)["blk.0.attn_q.weight.lora_a"], np.zeros((64, 5), np.float32)
    writer = gguf.GGUFWriter(other, "llama")
    writer.add_string("adapter.type", "lora")
    writer.add_tensor("blk.0.attn_q.weight.lora_a", a)
    writer.add_tensor("blk.0.attn_q.weight.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"A takes 64 to rank 7, B rank 5 to 64"):
        open_bundle(f32, [f"x={other}"])


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
