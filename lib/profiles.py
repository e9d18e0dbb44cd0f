"""Every hyper-parameter of every size of run, in one place."""

import dataclasses
import os
import random
from dataclasses import dataclass, field

from lib.errors import require

# The tutorial's three choices of what to adapt.
TARGETS: dict[str, tuple[str, ...]] = {
    "minimal": ("q_proj", "v_proj"),
    "standard": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "aggressive": ("q_proj", "k_proj", "v_proj", "o_proj",
                   "gate_proj", "up_proj", "down_proj"),
}
MODES = ("lora", "qlora", "full")


@dataclass(frozen=True)
class TrainSettings:
    """One training run. What differs from the tutorial says why.

    Attributes:
        mode: "lora", "qlora" (NF4 base, double quantisation) or "full".
        targets: key of TARGETS, or module names separated by commas.
        dropout: 0 here, 0.05 in the tutorial: each example is seen a few
            times at most, and a random mask costs a pass over every input.
        learning_rate: 3e-3 here, 2e-4 in the tutorial: a small model and
            some hundred steps (`data/results/` has the sweep).
        steps: optimizer steps of `batch_size` examples (16, the tutorial's
            effective batch), which go through in `accumulate` parts: less
            memory, the same sums. Each of several processes takes as many.
        warmup: share of the steps over which the learning rate rises.
        plain: use TRL's stock step instead of ours.
    """

    mode: str = "lora"
    targets: str = "aggressive"
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    rslora: bool = False
    learning_rate: float = 3e-3
    steps: int = 100
    batch_size: int = 16
    accumulate: int = 1
    warmup: float = 0.05
    max_length: int = 512
    seed: int = 0
    plain: bool = False

    def __post_init__(self) -> None:
        require(self.mode in MODES, f"mode {self.mode!r}: use one of {', '.join(MODES)}")
        require(self.rank > 0, f"rank {self.rank}: use a positive whole number, such as 16")
        require(self.steps > 0, f"steps {self.steps}: use a positive whole number")
        require(self.batch_size > 0, f"batch size {self.batch_size}: use 1 or more")
        require(self.accumulate > 0 and self.batch_size % self.accumulate == 0,
                f"accumulate {self.accumulate}: use a divisor of the batch size")
        require(self.alpha > 0, f"alpha {self.alpha}: use a positive number, such as 32")
        require(0 <= self.dropout < 1, f"dropout {self.dropout}: use 0 up to below 1")
        require(0 < self.learning_rate < float("inf"),
                f"learning rate {self.learning_rate}: use a number above 0")
        require(0 <= self.warmup < 1, f"warmup {self.warmup}: use a share from 0 up to below 1")
        require(self.max_length > 1, f"max length {self.max_length}: use 2 or more")
        require(0 <= self.seed < 2**32, f"seed {self.seed}: use 0 up to below 2^32")

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


PROFILES: dict[str, Profile] = {
    p.name: p
    for p in (
        Profile("smoke", train=TrainSettings(mode="qlora", steps=2, batch_size=2),
                score_examples=4, loss_examples=4, new_tokens=4, repeats=1),
        Profile("laptop", train=TrainSettings(mode="qlora", steps=60, accumulate=2),
                loss_examples=48),
        Profile("reference", train=TrainSettings(mode="qlora", steps=100),
                score_examples=500, loss_examples=500, repeats=7),
        Profile("gpu-7b", model="meta-llama/Llama-2-7b-chat-hf",
                train=TrainSettings(mode="qlora", targets="standard", dropout=0.05,
                                    learning_rate=2e-4, steps=938, warmup=0.03,
                                    accumulate=4, max_length=2048),
                score_examples=500, loss_examples=500),
    )
}


def default_profile() -> str:
    """Profile named by the environment variable COURSE_PROFILE, else laptop."""
    return os.environ.get("COURSE_PROFILE", "laptop")


def get_profile(name: str, model: str = "") -> Profile:
    """Profile by name, with another base model if one is given."""
    require(name in PROFILES, f"unknown profile {name!r}: use one of {', '.join(PROFILES)}")
    profile = PROFILES[name]
    model = model or os.environ.get("MODEL", "")
    return dataclasses.replace(profile, model=model) if model else profile


@dataclass(frozen=True)
class ServeSettings:
    """How a server runs.

    Attributes:
        context: tokens of prompt and answer together, for each request.
        slots: requests computed at the same time, in one batch.
        threads: of the engine; 0 takes every core that the process may use.
        port: on loopback; 0 takes a free one.
    """

    context: int = 2048
    slots: int = 4
    threads: int = 0
    port: int = 8080

    def __post_init__(self) -> None:
        require(self.context >= 16, f"context {self.context} is too short: use 16 or more")
        require(1 <= self.slots <= 1024, f"{self.slots} slots serve nobody: use 1 to 1024")
        require(0 <= self.threads <= 1024, f"{self.threads} threads: use 0, every core, to 1024")
        require(0 <= self.port < 65536, f"port {self.port} does not exist: use 0 to 65535")


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch: the one place where seeds are set."""
    # Here, because a server and the doctor read this module and need neither.
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
