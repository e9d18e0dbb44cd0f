"""Models of other families: trained, merged, exported, served, against transformers."""

from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib.base.model import load_tokenizer
from lib.base.records import encode, prompt_ids, sensors
from lib.client import ask, connect, question
from lib.evaluate.scores import generate
from lib.quantize.gguf import export
from lib.quantize.merging import merge
from lib.serve.server import running
from lib.settings import TrainSettings
from lib.train.training import train

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "bos_token_id": 1,
         "eos_token_id": 2, "pad_token_id": 0}
SCALED = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
FAMILIES: dict[str, dict[str, object]] = {
    "Qwen2": {}, "Qwen3": {"tie_word_embeddings": True}, "Mistral": {}, "Granite": {},
    "Gemma3": {"tie_word_embeddings": True, "query_pre_attn_scalar": 16, "sliding_window": 32},
    "Llama": {"rope_parameters": SCALED, "attention_bias": True}, "Phi3": {}}


def sentencepiece_files(folder: Path) -> None:
    """A SentencePiece tokenizer; transformers would change the embedded one for a Qwen2."""
    import sentencepiece

    lines = [text for row in sensors("train", 300) for text in (row["instruction"],
                                                                row["response"])]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "tokenizer"), vocab_size=400,
        byte_fallback=True, bos_id=1, eos_id=2, pad_id=-1, unk_id=0, minloglevel=2,
        user_defined_symbols=["<|endoftext|>"])  # which llama.cpp looks for in a Phi 3
    (folder / "tokenizer.vocab").unlink()
    transformers.LlamaTokenizer.from_pretrained(folder).save_pretrained(folder)


def until_a_tie(model: PreTrainedModel, tokens: PreTrainedTokenizerBase, asked: str) -> str:
    """The greedy answer up to a token that another one nearly equals; "" if none does.

    There the last bits decide, and they depend on the processor.
    """
    ids = torch.tensor([prompt_ids(tokens, asked)])
    done = model.generate(ids, max_new_tokens=12, do_sample=False, output_logits=True,
                          return_dict_in_generate=True)
    best = torch.stack(done.logits)[:, 0].float().topk(2).values
    ties = (best[:, 0] - best[:, 1] < 0.01).nonzero().flatten().tolist()
    answer = done.sequences[0, ids.shape[1]:]
    return tokens.decode(answer[:ties[0]], skip_special_tokens=True).strip() if ties else ""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_another_family_from_records_to_a_served_answer(
        family: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    folder, out = tmp_path / family, tmp_path / "adapter"
    folder.mkdir()
    if pieces := family != "Qwen3":  # a small vocabulary saves time
        sentencepiece_files(folder)
    else:
        tokenizer.save_pretrained(folder)
    words = len(load_tokenizer(str(folder)))
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else
                     f"{family}Config")(vocab_size=words, **SHAPE | FAMILIES[family])
    model: PreTrainedModel = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():  # far from 0, so that mistakes show
            parameter.mul_(6 if parameter.dim() > 1 else 1)
            parameter.add_(0.1 * torch.randn_like(parameter) * (parameter.dim() == 1))
        if pieces:  # no bytes in its answers: transformers joins them otherwise
            model.lm_head.weight[:260] = 0
    model.save_pretrained(folder)
    targets = "qkv_proj,down_proj" if family == "Phi3" else "q_proj,k_proj,v_proj,down_proj"
    records = sensors("train", 8)
    if family == "Qwen2":  # as transformers reads this vocabulary, there are no spaces
        records = [row | {"response": row["response"].replace(" ", "")} for row in records]
    train(records, TrainSettings(steps=3, batch_size=4, rank=4, targets=targets,
                                 learning_rate=0.01), model=str(folder), out=out)
    export(tmp_path / "edge", merged=out, gguf_type="F32")
    export(tmp_path / "beside", adapters={"one": out}, gguf_type="F32")
    merged, tokens = merge(out), load_tokenizer(str(out))
    asked = sensors("test", 1)[0]["instruction"]
    wanted = generate(merged, tokens, [asked], max_new_tokens=12)[0]
    start = until_a_tie(merged, tokens, asked)
    ids = encode(tokens, {"prompt": asked, "completion": "a"})[0]
    with torch.no_grad():
        likeliest = int(merged(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
    for name, model_name in (("edge", ""), ("beside", "one")):
        with (running(tmp_path / name, "--context", "256") as served,
              connect(served.url) as client):
            if family != "Qwen2":  # transformers reads this vocabulary otherwise than llama.cpp
                answer = ask(client, question(asked, model=model_name, max_tokens=12)).text
                assert wanted and (answer == wanted or (start and answer.startswith(start)))
            reply = client.post("/completions", json={
                "prompt": ids, "max_tokens": 1, "temperature": 0, "n_probs": 1,
                "model": model_name}).json()
            assert reply["choices"][0]["logprobs"]["content"][0]["id"] == likeliest
