"""Every hyper-parameter of every size of run, in one place."""

import os
import re
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

from lib.errors import require

# The tutorial's three choices of what to adapt.
TARGETS: dict[str, tuple[str, ...]] = {
    "minimal": ("q_proj", "v_proj"),
    "standard": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "aggressive": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")}
MODES = ("lora", "qlora", "full")
METHODS = ("plain", "coa", "paper", "shared", "dedicated")


def check_bounds(settings: Any, **bounds: tuple[float, float]) -> None:
    """Raise UserError for a field outside its bounds; both ends are allowed."""
    for name, (low, high) in bounds.items():
        value, limit = getattr(settings, name), f"to {high}" if high < inf else "or more"
        require(low <= value <= high and value < inf,
                f"{name.replace('_', ' ')} {value}: use {low} {limit}")


@dataclass(frozen=True)
class TrainSettings:
    """One training run. Where a default differs from the tutorial, the comment says why."""

    mode: str = "lora"  # or "qlora" (NF4 base, double quantisation), or "full"
    targets: str = "aggressive"  # key of TARGETS, or module names separated by commas
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0  # the tutorial has 0.05; here an example is seen a few times at most
    rslora: bool = False
    learning_rate: float = 3e-3  # the tutorial has 2e-4; model and run are small here
    steps: int = 100  # optimizer steps in each process
    batch_size: int = 16  # examples in a step: the tutorial's effective batch
    accumulate: int = 1  # parts in which a batch is computed: less memory, the same sums
    warmup: float = 0.05  # share of the steps over which the learning rate rises
    max_length: int = 512
    learn: str = "all"  # or "last", of the assistant's turns
    template: str = "auto"  # the model's own, the course's for the embedded one; "own", "course"
    seed: int = 0
    eval_share: float = 0.0  # of the records, for validation along the way
    eval_every: int = 0  # steps between two validations; 0 is a tenth of the run
    patience: int = 0  # validations without gain after which the run stops; 0 is never
    report_to: str = "none"  # or tensorboard, trackio, ...: where losses go as well
    method: str = "plain"  # or over quantised configurations: coa, paper, shared, dedicated
    formats: str = "nf"  # of the configurations, or gguf: the types of llama.cpp
    configuration: str = ""  # file of the one that method dedicated trains for
    plain: bool = False  # TRL's own step instead of ours

    def __post_init__(self) -> None:
        for name, choices in (("mode", MODES), ("learn", ("all", "last")),
                              ("template", ("auto", "own", "course")),
                              ("method", METHODS), ("formats", ("nf", "gguf"))):
            value = getattr(self, name)
            require(value in choices, f"{name} {value!r}: use one of {', '.join(choices)}")
        require(bool(self.configuration) == (self.method == "dedicated"),
                "--configuration FILE and --method dedicated go together: give both, or neither")
        require(self.formats == "nf" or self.method in METHODS[1:4], f"formats {self.formats}: use "
                f"it with --method {', '.join(METHODS[1:4])}")
        require(self.method == "plain" or (self.mode == "lora" and {*self.modules} == {*TARGETS[
            "aggressive"]}), "train over configurations with mode lora and targets aggressive")
        require(self.method in ("plain", "dedicated") or not (self.eval_share or self.patience),
                "many configurations have no one held-out loss: leave out --eval-share, --patience")
        for name in ("targets", "rank", "alpha", "dropout", "rslora"):
            require(self.mode != "full" or getattr(self, name) == getattr(TrainSettings, name),
                    f"{name} {getattr(self, name)}: leave it out, mode full trains no adapter")
        check_bounds(self, rank=(1, inf), alpha=(1, inf), dropout=(0, 0.99), steps=(1, inf),
                     learning_rate=(1e-12, inf), batch_size=(1, inf), warmup=(0, 0.99),
                     accumulate=(1, self.batch_size), max_length=(2, inf), seed=(0, 2**32 - 1),
                     eval_share=(0, 0.5), eval_every=(0, inf), patience=(0, inf))
        require(self.batch_size % self.accumulate == 0,
                f"accumulate {self.accumulate}: use a divisor of the batch size")

    @property
    def modules(self) -> list[str]:
        """Names of the linear layers that get an adapter."""
        return list(TARGETS.get(self.targets) or self.targets.split(","))


@dataclass(frozen=True)
class Profile:
    """Size of a run: how many steps, examples and tokens a notebook uses."""

    name: str
    model: str = "embedded"
    train: TrainSettings = field(default_factory=TrainSettings)
    score_examples: int = 64
    loss_examples: int = 64
    new_tokens: int = 56
    repeats: int = 3


PROFILES: dict[str, Profile] = {profile.name: profile for profile in (
    Profile("smoke", train=TrainSettings(mode="qlora", steps=2, batch_size=2),
            score_examples=4, loss_examples=4, new_tokens=4, repeats=1),
    Profile("laptop", train=TrainSettings(mode="qlora", steps=60, accumulate=2), loss_examples=48),
    Profile("reference", train=TrainSettings(mode="qlora", steps=100),
            score_examples=500, loss_examples=500, repeats=7),
    Profile("gpu-7b", model="meta-llama/Llama-2-7b-chat-hf", train=TrainSettings(
        mode="qlora", targets="standard", dropout=0.05, learning_rate=2e-4, steps=938, warmup=0.03,
        accumulate=4, max_length=2048), score_examples=500, loss_examples=500),)}


def get_profile(name: str, model: str = "") -> Profile:
    """Profile by name, with another base model if one is given."""
    require(name in PROFILES, f"unknown profile {name!r}: use one of {', '.join(PROFILES)}")
    model = model or os.environ.get("MODEL", "") or PROFILES[name].model
    return replace(PROFILES[name], model=model)


@dataclass(frozen=True)
class ServeSettings:
    """How a server runs."""

    context: int = 0  # tokens of prompt and answer together; 0 is up to 2,048, as the model has
    slots: int = 4  # requests computed at the same time, in one batch
    threads: int = 0  # of the engine; 0 means all cores this process may use
    engine: str = ""  # a `llama-server` of one's own; empty is the wheel's
    port: int = 8080  # on loopback; 0 means any free port
    max_tokens: int = 1024  # of an answer whose request has no limit
    strict: bool = False  # refuse unknown fields, instead of naming them in a header
    api_key: str = ""  # that requests must carry; none is needed if it is empty
    cors: str = ""  # web pages that may ask, as origins separated by commas
    until_eof: bool = False  # print the address as JSON, and stop when standard input ends

    def __post_init__(self) -> None:
        require(self.context % 256 == 0, f"context {self.context}: use a multiple of 256")
        check_bounds(self, context=(0, inf), slots=(1, 1024), threads=(0, 1024), port=(0, 65535),
                     max_tokens=(1, inf))
        pages = re.fullmatch(r"((\*|null|https?://[^/\s,*A-Z]+)(,|$))*", self.cors)
        require(pages, f"cors {self.cors!r}: use https://page.example,https://other.example, or *")


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch: the one place where seeds are set."""
    from transformers import set_seed  # here, because the server reads this module
    set_seed(seed)
