"""Scores of generated answers, the loss of the true ones, intervals, and the look of figures."""

import contextlib
import itertools
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from peft import PeftModel
from scipy.special import ndtr, stdtrit
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lib.base.model import context, decoded, pad_right
from lib.base.records import IGNORED, Record, encode, prompt_ids
from lib.errors import UserError, require

# Okabe and Ito's palette, without its yellow, which a projector loses.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")


@dataclass(frozen=True)
class Score:
    """Which examples were right, with a 95 % Wilson interval of the share."""

    hits: tuple[bool, ...]
    texts: tuple[str, ...]

    @property
    def share(self) -> float:
        return sum(self.hits) / len(self.hits)

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(sum(self.hits), len(self.hits))

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.share:.1%} [{low:.1%}, {high:.1%}] of {len(self.hits)}"


@torch.inference_mode()
def generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
             questions: Sequence[str | Sequence[Record]], *, max_new_tokens: int = 56,
             batch_size: int = 100, cut: list[int] | None = None) -> list[str]:
    """Greedy answers; `cut` gets the numbers of those cut by `max_new_tokens` or the context."""
    prompts = [prompt_ids(tokenizer, question) for question in questions]
    # A model may end its turn with another token than its tokenizer's end of text.
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None) or []
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    with contextlib.suppress(UserError):  # and what training taught as the end of an answer
        _, labels = encode(tokenizer, {"prompt": "a", "completion": "b"})
        ends.add([label for label in labels if label != IGNORED][-1])
    room = int(min(context(model), 1 << 30))
    if max(map(len, prompts), default=0) + max_new_tokens > room:
        batch_size = 1  # a long prompt beside a short one would take its room
    # Prompts of similar length share a batch, so that there is little padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    with contextlib.ExitStack() as stack:
        own_settings = getattr(core, "generation_config", None)
        stack.callback(setattr, core, "generation_config", own_settings)
        core.generation_config = GenerationConfig()  # its own may sample, stop at texts, ...
        # For each row of its strided view torch would copy the head's weight: gigabytes.
        stack.enter_context(model.get_output_embeddings().register_forward_pre_hook(
            lambda _, inputs: (inputs[0].contiguous(), *inputs[1:])))
        for start in range(0, len(order), batch_size):
            rows = order[start:start + batch_size]
            # Padded on the left, all answers of a batch start in the same column.
            batch = tokenizer.pad({"input_ids": [prompts[i] for i in rows]}, return_tensors="pt",
                                  padding_side="left").to(model.device)
            output = model.generate(
                **batch, do_sample=False,
                max_new_tokens=min(max_new_tokens, room - batch.input_ids.shape[1]),
                eos_token_id=sorted(ends - {None}), pad_token_id=tokenizer.pad_token_id)
            new = output[:, batch.input_ids.shape[1]:]
            texts = tokenizer.batch_decode(new, skip_special_tokens=True)
            for row, text, ids in zip(rows, texts, new.tolist(), strict=True):
                answers[row] = text.strip()
                if cut is not None and not ends & {*ids}:
                    cut.append(row)
    return answers


def keyword_score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
                  records: Sequence[Record], **options: Any) -> Score:
    """Share of generated answers that contain the keyword; `options` go to `generate`."""
    was_training, _ = model.training, model.eval()
    with decoded(model):
        texts = generate(model, tokenizer, [r["instruction"] for r in records], **options)
    model.train(was_training)
    hits = (keyword_hit(t, r["expected_keyword"]) for t, r in zip(texts, records, strict=True))
    return Score(tuple(hits), tuple(texts))


def keyword_hit(text: str, keyword: str) -> bool:
    """Whether the text contains the keyword, in upper or lower case."""
    return keyword.lower() in text.lower()


@torch.inference_mode()
def held_out_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
                  records: Sequence[Record], *, batch_size: int = 25, learn: str = "all") -> float:
    """Mean negative log-likelihood (nats) of an answer token; prompts do not count."""
    pairs = (encode(tokenizer, record, learn=learn) for record in records)
    with decoded(model):
        losses, counts = zip(*batch_losses(model, pairs, batch_size), strict=True)
    return sum(losses) / sum(counts)


def batch_losses(model: PreTrainedModel, pairs: Iterable[tuple[list[int], list[int]]],
                 batch_size: int) -> Iterator[tuple[float, int]]:
    """`answer_loss` of each batch of `encode`'s pairs."""
    pairs = iter(pairs)
    while batch := [*itertools.islice(pairs, batch_size)]:
        ids, labels = pad_right(batch, 0)  # padding has no label
        loss, count = answer_loss(model, ids.to(model.device), labels.to(model.device))
        yield loss.item(), count


def answer_loss(model: PreTrainedModel, ids: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Summed cross-entropy of labelled tokens, and their number; right padding needs no mask."""
    target = labels[:, 1:]  # only the columns that predict a label go through the head
    columns = (target != IGNORED).any(0).nonzero()[:, 0]
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=columns).logits
    target = target[:, columns]
    keep = target != IGNORED
    loss = nn.functional.cross_entropy(logits[keep].float(), target[keep], reduction="sum")
    return loss, int(keep.sum())


def wilson(hits: int, total: int) -> tuple[float, float]:
    """95 % score interval of a binomial share, with z = 1.96 (Wilson 1927)."""
    from scipy.stats import binomtest  # here, because it takes half a second
    require(total > 0, "no examples to score: give at least one")
    low, high = binomtest(hits, total).proportion_ci(2 * ndtr(1.96) - 1, "wilson")
    return float(low), float(high)


def paired_interval(differences: Tensor) -> tuple[float, float, float]:
    """(mean, low, high) of paired differences and the 95 % interval of their mean.
    `differences` has an axis for each thing drawn, such as (seeds, configurations, examples);
    the interval is for drawing all again. V = sum of v_a, v_a = s_a^2 / n_a, where s_a^2 is the
    sample variance of the n_a > 1 means along axis a (Cameron, Gelbach, Miller 2011, without the
    term they subtract, so rather wide). The half-width is Student's t sqrt(V) with
    V^2 / sum(v_a^2 / (n_a - 1)) degrees of freedom (Welch 1947). Notebook 06 has its coverage."""
    values, variance, freedom = differences.double(), 0.0, 0.0
    require(values.numel() > 1, "one difference has no interval: give several")
    for axis, count in enumerate(values.shape):
        if count > 1:
            own = float(values.movedim(axis, 0).reshape(count, -1).mean(1).var()) / count
            variance, freedom = variance + own, freedom + own ** 2 / (count - 1)
    mean = float(values.mean())
    half = float(stdtrit(variance ** 2 / freedom, 0.975)) * variance ** 0.5 if freedom else 0.0
    return mean, mean - half, mean + half


@contextlib.contextmanager
def peak_memory(interval: float = 0.05, *, children: bool = False) -> Iterator[dict[str, float]]:
    """Peak memory, {"mb": 10^6 bytes}, of this process, or of its `children`, in the block.
    Allocated memory on a GPU, exact; else resident memory, sampled every `interval` seconds."""
    peak, stop, process = {"mb": 0.0}, threading.Event(), psutil.Process()

    def watch() -> None:
        while True:
            total = 0
            for one in process.children(recursive=True) if children else [process]:
                with contextlib.suppress(psutil.Error):  # it may have ended meanwhile
                    total += one.memory_info().rss
            peak["mb"] = max(peak["mb"], total / 1e6)
            if stop.wait(interval):
                return

    if on_gpu := torch.cuda.is_available() and not children:
        torch.cuda.reset_peak_memory_stats()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(watch)
        try:
            yield peak
        finally:
            stop.set()
    if on_gpu:
        peak["mb"] = torch.cuda.max_memory_allocated() / 1e6


def use_style() -> None:
    """Set matplotlib's defaults for the course: one look, legible on a projector."""
    import matplotlib.pyplot as plt  # here, because it takes a second
    plt.style.use(Path(__file__).with_name("course.mplstyle"))
    plt.rcParams["axes.prop_cycle"] = plt.cycler(color=COLOURS)


def smoothed(values: Sequence[float], window: int = 9) -> np.ndarray:
    """Running mean over `window` values around each, fewer at the ends."""
    # As many values on the left as on the right, so that a falling curve is not shifted.
    reach = [min(window // 2, i, len(values) - 1 - i) for i in range(len(values))]
    return np.array([np.mean(values[i - n:i + n + 1]) for i, n in enumerate(reach)])
