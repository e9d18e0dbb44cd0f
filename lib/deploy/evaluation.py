"""Systems of any kind on the user's own records: right answers, loss, and their difference."""

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import eq
from pathlib import Path
from typing import Any

import torch

from lib.base.model import context, load_model, load_tokenizer, require_rows
from lib.base.records import IGNORED, LABEL, Record, encode
from lib.client import ask_all, connect, question
from lib.deploy.packed import WEIGHTS, load_deployed
from lib.errors import UserError, require
from lib.evaluate.scores import Score, batch_losses, generate, keyword_hit, paired_interval
from lib.train.lora import load_adapter, settled
from lib.train.training import base_for


@dataclass(frozen=True)
class Evaluation:
    """What one system did: empty where there is nothing to measure."""

    # "exact match" with the last turn; "keyword": the label is in it; "likeliest": of few answers
    scores: dict[str, Score] = field(default_factory=dict)
    loss: float = 0.0  # mean negative log-likelihood of a learned token, nats
    sums: tuple[float, ...] = ()  # of these in a record
    counts: tuple[int, ...] = ()  # the learned tokens of a record
    cut: int = 0  # answers that reached the limit of their tokens

    def figures(self) -> dict[str, Any]:
        """What is stored and printed; shares with their 95 % Wilson intervals."""
        row: dict[str, Any] = {n: [s.share, *s.interval] for n, s in self.scores.items()}
        row |= {"cut off": self.cut} if self.cut else {}
        return row | ({"loss": self.loss, "perplexity": math.exp(self.loss)} if self.sums else {})


def open_system(system: str, route: str = "", base: str = "") -> tuple[Any, Any]:
    """Model and tokenizer of a packed deployment, a model, or an adapter of this route and base."""
    path = Path(system)
    require(not (path / "model.gguf").is_file(), f"{system} is an export: serve it, and evaluate "
            "the address that `serve` prints")
    if (path / WEIGHTS).is_file():
        return load_deployed(path), load_tokenizer(system)
    if not (path / "adapter_config.json").is_file():
        return load_model(system), load_tokenizer(system)
    base, route = settled(path, base, route)
    model = base_for("qlora" if route == "dequantized" else "lora", base)
    tokenizer = load_tokenizer(system, base=base)
    require_rows(model, tokenizer)
    return load_adapter(model, path), tokenizer


def evaluate(system: str, records: Sequence[Record], *, new_tokens: int = 0, route: str = "",
             base: str = "", learn: str = "all", places: Sequence[str] = ()) -> Evaluation:
    """One system on records: what `open_system` opens, or the address of a server, http://...
    ".../v1#NAME" asks a server for that model. `learn` as in `encode`; `places` name records."""
    asked = [record for record in records if "messages" in record]
    require(not any("tools" in row or row["messages"][-1].get("tool_calls") for row in asked),
            "tools are not scored: leave them out with --ignore tools, and records that call one")
    require(asked or (learn == "all" and not new_tokens), "all of a text counts, and none is "
            "answered: leave --learn and --new-tokens out")
    kinds = {("messages" in row, LABEL in row) for row in records}
    require(len(kinds) < 2 and kinds != {(False, True)}, "some records have no question, or no "
            f"{LABEL}: evaluate them apart, or --ignore {LABEL}")
    prompts = [record["messages"][:-1] for record in asked]
    right = [record["messages"][-1]["content"] for record in asked]
    longest = max([128, *(len(text.encode()) for text in right)])  # a token has a byte or more
    pairs, losses, texts, chosen, cut = [], [], [], [], list[int]()
    if system.startswith(("http://", "https://")):
        url, _, name = system.partition("#")
        require(asked, f"{url} can be asked, but plain texts have no question: give a model")
        require(most := new_tokens or longest * (longest <= 1024), "an answer has more than 1,024 "
                "bytes: give --new-tokens, as many as its tokens")
        try:
            if not name:
                with connect(url) as client:
                    reply = client.get("/models")
                names = [row["id"] for row in reply.json()["data"]] if reply.is_success else [""]
                require(len(names) == 1, f"it serves {', '.join(names)}: which one?")
                name = names[0]
            given = ask_all(url, [question("", model=name, messages=p, max_tokens=most)
                                  for p in prompts])
            texts, cut = [a.text for a in given], [i for i, a in enumerate(given) if not a.whole]
        except Exception as error:  # of many kinds: the address, the network, the reply
            raise UserError(f"{url} gives no answers ({' '.join(str(error).split())}): check "
                            "that it runs; add #MODEL, and its key in COURSE_API_KEY") from None
    else:
        model, tokenizer = open_system(system, route, base)
        pairs = encoded(model, tokenizer, records, learn=learn, places=places)
        with torch.inference_mode():
            losses = [*batch_losses(model, pairs, 1)]
            answers = [*dict(zip(map(_plain, right), right, strict=True)).values()]
            few = 1 < len(answers) <= min(8, len(asked) / 2)  # so few are labels
            if few and not any("</think>" in text for text in right):  # each has its own thought
                chosen = [likeliest(model, tokenizer, row, answers) for row in asked]
        if prompts:
            texts = generate(model, tokenizer, prompts, max_new_tokens=new_tokens or longest,
                             cut=cut)
    said, due = ([*map(_plain, part)] for part in (texts, right))
    labels = [_plain(str(row[LABEL])) for row in asked if LABEL in row]
    # Where "not spam" is a label as well, it is no "spam", unless the right answer has both.
    wider = {a: [b for b in {*labels} if keyword_hit(b, a) and len(b) > len(a)] for a in {*labels}}
    hits = {"exact match": [*map(eq, said, due)],
            "keyword": [keyword_hit(t, a) and not any(keyword_hit(t, b) > keyword_hit(d, b) for b in
                        wider[a]) for t, a, d in zip(said, labels, due, strict=False)],
            "likeliest": [*map(eq, map(_plain, chosen), due)]}
    scores = {name: Score(tuple(right), tuple(texts)) for name, right in hits.items() if right}
    mean = sum(loss for loss, _ in losses) / max(sum(count for _, count in losses), 1)
    require(mean < 700, f"{system} has a loss of {mean:g}: its weights may be damaged")
    sums, counts = zip(*losses, strict=True) if losses else ((), ())
    return Evaluation(scores, mean, sums, counts, len(cut))


def _plain(answer: str) -> str:
    """An answer without thoughts, which a server does not show, and with composed accents."""
    answer = answer.rpartition("</think>")[2].strip()
    return unicodedata.normalize("NFC", "" if answer.startswith("<think>") else answer)


def likeliest(model: Any, tokenizer: Any, record: Record, answers: Sequence[str]) -> str:
    """The answer whose tokens together are the likeliest."""
    *prompt, last = record["messages"]
    pairs = (encode(tokenizer, {"messages": [*prompt, last | {"content": answer}]}, learn="last",
                    asked=False) for answer in answers)
    losses = [loss for loss, _ in batch_losses(model, pairs, 1)]
    return answers[losses.index(min(losses))]


def encoded(model: Any, tokenizer: Any, records: Sequence[Record], *, learn: str,
            places: Sequence[str]) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of records; UserError names one that the model's context does not hold."""
    pairs = []
    for record, where in zip(records, places or ["a record"] * len(records), strict=True):
        pairs.append(encode(tokenizer, record, learn=learn, where=where, asked=False))
        require(len(pairs[-1][0]) <= context(model), f"{where} is longer than the model's "
                f"context, {context(model)} tokens: split it")
    return pairs


def divergences(one: str, other: str, records: Sequence[Record], *, learn: str = "all",
                places: Sequence[str] = (), **options: str) -> dict[str, Any]:
    """How two models differ at the learned tokens, in means over records: KL(one || other), nats,
    with its 95 % interval, and the share with one likeliest token. `options`: of `open_system`."""
    systems = [open_system(system, **options) for system in (one, other)]
    pairs, theirs = (encoded(*s, records, learn=learn, places=places) for s in systems)
    require(pairs == theirs, f"{one} and {other} read different tokens: leave --divergence out")
    size = 1 + min(max(tokenizer.get_vocab().values()) for _, tokenizer in systems)
    kl, same = [], []
    for ids, labels in pairs:
        at = torch.tensor([i - 1 for i, label in enumerate(labels) if i and label != IGNORED])
        with torch.inference_mode():
            p, q = (model(torch.tensor([ids], device=model.device), use_cache=False, logits_to_keep=
                          at.to(model.device)).logits[0, :, :size].float().log_softmax(-1).cpu()
                    for model, _ in systems)
        kl.append(float((p.exp() * (p - q)).sum(-1).mean()))
        same.append(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
    interval = paired_interval(torch.tensor(kl)) if kl[1:] else kl
    return {"KL by record": [max(0.0, x) for x in interval], "same top": sum(same) / len(same)}


def differences(one: Evaluation, other: Evaluation) -> dict[str, tuple[float, float, float]]:
    """Second less first on the same records, (mean, low, high) of the 95 % interval."""
    rows = {name: torch.tensor(other.scores[name].hits).double() - torch.tensor(score.hits).double()
            for name, score in one.scores.items() if name in other.scores}
    if one.sums and other.sums:  # in all, if the tokenizers differ: tokens of two are no one unit
        alike = one.counts == other.counts
        a, b = (torch.tensor(e.sums) / torch.tensor(e.counts if alike else 1) for e in (one, other))
        rows["loss by record" if alike else "nats by record"] = b - a
    return {name: paired_interval(row) for name, row in rows.items() if len(row) > 1}
