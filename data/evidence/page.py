"""Does the tutorial's code run on the pinned versions (T16)? Its calls, tried on a tiny model.

Nothing is trained: a call is made with the page's arguments, and what it raises is stored.
Each argument of the training configuration is also tried alone, because an exception
names only the first wrong one.
"""

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForLanguageModeling,
)
from trl import SFTConfig, SFTTrainer

from data.evidence.tiny import tiny_model
from lib.base.embedded import quiet
from lib.base.model import load_tokenizer
from lib.base.records import render, sensors
from lib.settings import TARGETS, seed_everything

SAVED = {"num_train_epochs": 3, "per_device_train_batch_size": 4,
         "gradient_accumulation_steps": 4, "learning_rate": 2e-4, "warmup_ratio": 0.03,
         "lr_scheduler_type": "cosine", "logging_steps": 10, "save_strategy": "epoch",
         "bf16": True, "optim": "paged_adamw_8bit", "max_seq_length": 2048,
         "dataset_text_field": "text"}
HERE = {"use_cpu": True, "bf16": False, "report_to": "none"}


def attempt(call: Callable[[], Any]) -> dict[str, Any]:
    """What a call raises, if anything, and whether only a GPU is missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call()
            error = ""
        except Exception as raised:  # any failure is a finding here
            error = f"{type(raised).__name__}: {str(raised).strip().splitlines()[0]}"[:240]
    return {"error": error,
            "wants_gpu": not torch.cuda.is_available() and "gpu" in error.lower()}


class Page:
    """The page's steps on a tiny model in a folder; each can be tried by itself."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.base = folder, str(folder / "base")
        tiny_model().save_pretrained(self.base)
        load_tokenizer().save_pretrained(self.base)
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        self.lora = LoraConfig(r=16, lora_alpha=32, target_modules=list(TARGETS["standard"]),
                               lora_dropout=0.05, bias="none", task_type="CAUSAL_LM")
        self.data = Dataset.from_list([{"text": text(r)} for r in sensors("train", 4)])

    def load(self, folder: str = "", **options: Any) -> Any:
        """A model by transformers' own call."""
        return AutoModelForCausalLM.from_pretrained(
            self.folder / (folder or "base"), device_map="auto", **options)

    def four_bit(self) -> Any:
        """The base in 4 bits, asked for by a dict; it must really be in 4 bits."""
        model = self.load(quantization_config={
            "load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float16})
        if not any(type(m).__name__ == "Linear4bit" for m in model.modules()):
            raise RuntimeError("the dict was ignored: no layer is in 4 bits")
        return model

    def half(self) -> Any:
        """The base in float16, asked for by `torch_dtype`; it must really be."""
        model = self.load(torch_dtype=torch.float16)
        if model.dtype != torch.float16:
            raise RuntimeError(f"torch_dtype was ignored: the model is in {model.dtype}")
        return model

    def config(self, **options: Any) -> SFTConfig:
        """The training configuration."""
        return SFTConfig(output_dir=str(self.folder / "run"), **options)

    def trainer(self, model: Any, **options: Any) -> SFTTrainer:
        """A trainer with a configuration that this version takes."""
        return SFTTrainer(model=model, train_dataset=self.data, args=self.config(**HERE),
                          **options)

    def merge(self) -> None:
        """Save an adapter, load it on a float16 base, merge, save."""
        get_peft_model(self.load(), self.lora).save_pretrained(self.folder / "adapter")
        model = PeftModel.from_pretrained(self.half(), str(self.folder / "adapter"))
        model.merge_and_unload().save_pretrained(self.folder / "merged")
        self.tokenizer.save_pretrained(self.folder / "merged")

    def int8(self) -> None:
        """Quantise what was merged to INT8, and save it."""
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0)
        self.load("merged", quantization_config=config).save_pretrained(self.folder / "int8")

    def answer(self) -> str:
        """A sampled answer, decoded whole."""
        inputs = self.tokenizer(text({"instruction": "Is all well?"}), return_tensors="pt")
        output = self.load("int8").generate(**inputs, max_new_tokens=8, temperature=0.7,
                                            top_p=0.9, do_sample=True)
        return self.tokenizer.decode(output[0], skip_special_tokens=True)

    def calls(self) -> dict[str, Callable[[], Any]]:
        """The calls in the page's order; later ones use what earlier ones saved."""
        return {
            "load in 4 bits by a dict": self.four_bit,
            "prepare_model_for_kbit_training": lambda: prepare_model_for_kbit_training(
                self.four_bit()),
            "get_peft_model": lambda: get_peft_model(self.four_bit(), self.lora),
            "SFTConfig": lambda: self.config(**SAVED),
            "SFTTrainer with tokenizer=": lambda: self.trainer(
                self.load(), peft_config=self.lora, tokenizer=self.tokenizer),
            "SFTTrainer with a PeftModel and peft_config": lambda: self.trainer(
                get_peft_model(self.load(), self.lora), peft_config=self.lora),
            "load with torch_dtype": self.half,
            "merge_and_unload": self.merge,
            "quantise to INT8 and save": self.int8,
            "load the saved INT8": lambda: self.load("int8"),
            "generate": self.answer,
        }

    def faults(self) -> dict[str, bool]:
        """{fault that raises no error: whether it shows}."""
        plain, record = load_tokenizer(), sensors("train", 1)[0]
        plain.pad_token = plain.eos_token
        ids = [*plain(text(record)).input_ids, plain.eos_token_id]
        old = DataCollatorForLanguageModeling(plain, mlm=False)([{"input_ids": ids}])["labels"][0]
        trainer = self.trainer(self.load(), processing_class=plain)
        new = trainer.data_collator([trainer.train_dataset[0]])["labels"][0].tolist()
        prompt = len(plain(render(plain, record["instruction"])).input_ids)
        seed_everything(0)
        first = self.answer()
        return {
            "the loss covers the prompt": any(label >= 0 for label in new[:prompt // 2]),
            "pad = end: transformers' collator hides the end":
                plain.eos_token_id not in old.tolist(),
            "pad = end: TRL's collator hides the end": plain.eos_token_id not in new,
            "the decoded answer holds the prompt": "Is all well?" in first,
            "a second answer differs": self.answer() != first}


def text(record: dict[str, Any]) -> str:
    """Instruction and answer in the page's form."""
    return f"### Instruction:\n{record['instruction']}\n\n### Response:\n" + record.get(
        "response", "")


def page() -> dict[str, Any]:
    """The outcome of every call and every argument, and the faults that raise no error."""
    quiet()
    with tempfile.TemporaryDirectory() as scratch:
        tried = Page(Path(scratch))
        alone = {name: {"use_cpu": True, "bf16": False} | {name: value}
                 for name, value in SAVED.items() if name != "bf16"}
        # With `use_cpu` it would be accepted.
        alone["bf16"] = {"bf16": True}
        return {"calls": {name: attempt(call) for name, call in tried.calls().items()},
                "arguments": {name: attempt(lambda options=options: tried.config(**options))
                              for name, options in alone.items()},
                "faults": tried.faults()}
