"""CoA-LoRA: one adapter for every configuration (Ye, Tang, Ngai, arXiv 2509.25214).
A small network U_theta reads a layer's format and gives an r x r matrix:
dW = (alpha / r) B (I + U) A. With U = 0 this is LoRA. It is trained over many configurations, and
so are its baselines: over one it is a dedicated adapter (QLoRA), without a network a shared one."""

import itertools
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import TrainerCallback

from lib.base.embedded import EMBEDDED
from lib.base.model import MODULE_KINDS, load_tokenizer, release_memory
from lib.base.records import Record, Records
from lib.coa.configuration import Configuration, Layers, Switchable, best_formats, block_and_kind
from lib.errors import UserError, require
from lib.files import read_json, verified, writing
from lib.host import process_count
from lib.quantize.correction import WEIGHED_BY, input_roots, low_rank
from lib.quantize.formats import GRIDS
from lib.settings import METHODS, TrainSettings
from lib.train.lora import adapter_files, load_adapter, make_portable
from lib.train.training import TrainResult, train

NAME = "default"
# Of U: Adam moves all weights by about the learning rate, and U should move no faster than A and B.
PACE = 0.1
FELT_BY = 16  # examples whose gradients weigh the errors of layers
WIDTH, HIDDEN = 8, 128  # of an embedding, and between the two linear layers
OWNED = 1 / 4  # the share of the rank that only layers of 2 bits use
LEAST_LOSS = 0.02  # nats; below it a step follows the gradient of the loss itself again


class MixingNetwork(nn.Module):
    """U_theta: embeddings, LayerNorm, two linear layers, the last one zero at the start.
    U = pace * network(fields of a format, block, kind) + diag(gates(bits) - 1), for all layers at
    once, to (layers, r, r). A NormalFloat format has five fields, a GGUF format one, its type. The
    gates are ours and not learned: 1, and 0 for the last components, an `owned` share of the
    rank, in layers that do not have the first value of the first field (NormalFloat: 2 bits)."""

    def __init__(self, layers: Layers, rank: int, *, owned: float = 0, family: str = "nf") -> None:
        super().__init__()
        self.family, fields = family, [len(values) for values in GRIDS[family].values()]
        self.rank, self.owned = rank, round(rank * owned)  # numbers of components
        gates = torch.ones(1 + fields[0], rank)  # the last row: not quantised
        gates[1:, rank - self.owned:] = 0
        self.register_buffer("gates", gates, persistent=False)
        places = [block_and_kind(name) for name in layers.names]
        blocks = sorted({block for block, _ in places})
        self.places = [[blocks.index(block), MODULE_KINDS.index(kind)] for block, kind in places]
        sizes = [*fields, len(blocks), len(MODULE_KINDS)]
        self.embeddings = nn.ModuleList(nn.Embedding(size, WIDTH) for size in sizes)
        width = WIDTH * len(sizes)
        self.network = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, HIDDEN), nn.SiLU(),
                                     nn.Linear(HIDDEN, rank * rank))
        nn.init.zeros_(self.network[-1].weight)
        nn.init.zeros_(self.network[-1].bias)

    def forward(self, configuration: Configuration | None) -> Tensor:
        """(layers, r, r), float32. Without a configuration only the gates act."""
        if configuration is None:
            return torch.diag(self.gates[-1] - 1).expand(len(self.places), -1, -1)
        require(configuration.family == self.family, f"the adapter knows formats of the family "
                f"{self.family}, the configuration has {configuration.family}: use one of those")
        index = torch.cat([torch.tensor(configuration.indices), torch.tensor(self.places)], 1)
        index = index.to(self.gates.device)
        embedded = torch.cat([e(index[:, i]) for i, e in enumerate(self.embeddings)], 1)
        learned = PACE * self.network(embedded).view(-1, self.rank, self.rank)
        return learned + torch.diag_embed(self.gates[index[:, 0]] - 1)


class _Mixed(nn.Module):
    """Wherever a layer's A is read it is (I + U) A, with the U of the last forward pass."""

    def __init__(self, owner: "CoaLora", index: int) -> None:
        super().__init__()
        self._source = (owner, index)  # a tuple, because the owner must not become a submodule

    def forward(self, a: Tensor) -> Tensor:
        owner, index = self._source
        return owner.mixed.get(index, a)


def learned_a(layer: nn.Module) -> Tensor:
    """A itself, before U is applied."""
    return layer.lora_A[NAME].parametrizations.weight.original


class CoaLora:
    """A configuration-aware adapter on peft's own LoRA layers.
    A forward pass of `model`, peft's, applies U for `base.configuration`, and leaves it in
    `mixers`, (layers, r, r), and (I + U) A in `mixed`. `network` is trained with A and B."""

    def __init__(self, model: PeftModel, base: Switchable,
                 network: MixingNetwork | None = None) -> None:
        self.model, self.base, self.config = model, base, model.peft_config[NAME]
        self.network = network or MixingNetwork(base.layers, self.config.r)
        self.network.to(model.device)
        self.mixers: Tensor | None = None
        self.mixed: dict[int, Tensor] = {}
        find, names = model.get_submodule, base.layers.names
        self.lora_layers = {name: find(f"base_model.model.{name}") for name in names}
        for index, (name, layer) in enumerate(self.lora_layers.items()):
            require(hasattr(layer, "lora_A"), f"{name} has no adapter: train all seven kinds")
            parametrize.register_parametrization(
                layer.lora_A[NAME], "weight", _Mixed(self, index), unsafe=True)
            layer.merge = lambda *_, **__: require(False, "the base's weights are shared by its "
                                                   "configurations: materialise the adapter first")
        model.coa_network = self.network
        # peft's own method would write the parametrised A, and not theta.
        model.save_pretrained = self.write
        # On the model below peft's, because generate does not call peft's forward.
        model.get_base_model().register_forward_pre_hook(self._refresh)

    def _refresh(self, *_: Any) -> None:
        self.mixers = self.network(self.base.configuration)
        factors, widths = [*map(learned_a, self.lora_layers.values())], defaultdict(list)
        for index, a in enumerate(factors):
            widths[a.shape[1]].append(index)
        # One batched product for the layers of one width: two hundred small ones cost more.
        for _, rows in sorted(widths.items()):
            a = torch.stack([factors[index] for index in rows])
            self.mixed |= zip(rows, torch.baddbmm(a, self.mixers[rows], a), strict=True)

    def factors(self, configuration: Configuration | None = None) -> dict[str, Tensor]:
        """Adapter tensors by peft's names, float32. With a configuration, A is (I + U) A."""
        mixers = None if configuration is None else self.network(configuration).detach()
        tensors = {}
        for index, (name, layer) in enumerate(self.lora_layers.items()):
            a, b = learned_a(layer).detach(), layer.lora_B[NAME].weight.detach()
            a = a if mixers is None else torch.addmm(a, mixers[index], a)
            tensors |= {f"base_model.model.{name}.lora_{factor}.weight": t.float().contiguous()
                        for factor, t in (("A", a), ("B", b))}
        return tensors

    @property
    def facts(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {"base": self.base.name, "base_hash": self.base.fingerprint,
                "grid": self.network.family, "owned": {"2": self.network.owned / self.network.rank}}

    def write(self, part: Path | str, configuration: Configuration | None = None, *,
              state_dict: Any = None, save_embedding_layers: bool = False) -> None:  # as peft's
        """Files of A, B and theta, or of a plain adapter for one configuration, into a folder."""
        (part := Path(part)).mkdir(parents=True, exist_ok=True)  # as peft does
        save_file(self.factors(configuration), part / "adapter_model.safetensors")
        self.config.save_pretrained(str(part))
        make_portable(part, self.base.name)
        if configuration is None:
            save_file(self.network.state_dict(), part / "coa.safetensors")

    def materialise(self, configuration: Configuration, out: Path | str) -> None:
        """Write an ordinary peft adapter for one configuration, with U folded into A."""
        self.base.layers.require_same(configuration.layers)
        with writing(Path(out), **self.facts, configuration=configuration.to_json()) as part:
            self.write(part, configuration)

    @classmethod
    def from_pretrained(cls, base: Switchable, directory: Path | str) -> "CoaLora":
        """The adapter of an artifact, on its base; UserError if it does not fit."""
        manifest, theta = verified(directory := Path(directory)), directory / "coa.safetensors"
        require(theta.is_file(), f"{theta} is missing: the adapter is not configuration-aware")
        theirs, family, owned = (manifest.get(key) for key in ("base_hash", "grid", "owned"))
        require(theirs == base.fingerprint, f"{directory} was trained on another base, with hash "
                f"{str(theirs)[:8]}, this one has {base.fingerprint[:8]}: name that one")
        try:
            network = MixingNetwork(base.layers, adapter_files(directory)[0]["r"], family=family,
                                    owned=(owned or {"2": 0})["2"])
            network.load_state_dict(load_file(theta))
        except (LookupError, RuntimeError) as error:  # of a family, or of torch for a shape
            raise UserError(f"{theta} is of another version ({error}): train it again") from error
        return cls(load_adapter(base.model, directory), base, network)


class Switching(TrainerCallback):
    """Another configuration for each part of an optimizer step, in shuffled rounds."""

    def __init__(self, base: Switchable, among: Iterable[Configuration], seed: int) -> None:
        self.base, self.configurations, self.rng = base, [*among], random.Random(seed)
        self.left: list[Configuration] = []  # of this round

    def next(self) -> Configuration:
        """The next configuration of this round, or the first of a new one."""
        self.left = self.left or self.rng.sample(self.configurations, len(self.configurations))
        return self.left.pop(0)

    def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None,
                       **_: Any) -> None:  # if resumed; an epoch's last step may have fewer parts
        parts, batches = args.gradient_accumulation_steps, len(train_dataloader)
        epochs, steps = divmod(state.global_step, -(-batches // parts))
        for _part in range(epochs * batches + steps * parts):
            self.next()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.base.switch(self.next())

    on_substep_end = on_step_begin  # several in a step: a steadier gradient at no cost


def _descend_on_logarithm(trainer: Any, parts: int) -> None:
    """Divide each part's gradient by its loss, or one of too few bits would drown the others."""
    plain = trainer.compute_loss

    def compute(*args: Any, **options: Any) -> Tensor:
        loss = plain(*args, **options)
        value = loss.detach()  # this part's share of the step's loss
        # The logged value stays; the gradient is that of the loss's logarithm.
        return value + (loss - value) / (parts * value).clamp(min=LEAST_LOSS)

    trainer.compute_loss = compute


def train_over(base: Switchable, records: Iterable[Record], configurations: Sequence[Configuration],
               settings: TrainSettings, *, method: str = "coa", callbacks: Sequence[TrainerCallback]
               = (), **options: Any) -> tuple[TrainResult, CoaLora | None]:
    """Train one adapter on a base that changes its configuration in each part of a step.
    `base` is fresh and gets the adapter, which is also returned if it has a network. `method`:
    "paper", with the paper's network; "coa", also with owned components, which start from the
    quantisation error (NormalFloat's 2 bits); the others are plain LoRA. `options`: of `train`."""
    require(process_count() == 1, "it takes one process: start it without `accelerate launch`")
    require(method in METHODS, f"unknown method {method!r}: use one of {', '.join(METHODS)}")
    require(settings.mode == "lora" and set(settings.modules) == set(MODULE_KINDS),
            "train over configurations with mode lora and targets aggressive")
    require(len(configurations) == 1 or not (settings.eval_share or options.get("held")),
            "many configurations have no one held-out loss: leave out --eval-data, --eval-share")
    family, made, roots = configurations[0].family, list[CoaLora](), []
    one = {"configuration": configurations[0].to_json()} if len(configurations) == 1 else {}
    if method == "coa" and family == "nf":  # on the model as it is, before it gets the adapter
        roots = input_roots(base.model, base.layers.names, [*itertools.islice(
            records, WEIGHED_BY)], tokenizer=load_tokenizer(base.name, template=settings.template))

    def adapt(trainer: Any) -> None:
        if method in ("coa", "paper"):
            owned = OWNED if roots else 0
            network = MixingNetwork(base.layers, settings.rank, family=family, owned=owned)
            made.append(CoaLora(trainer.model, base, network))
            start_owned(made[0], roots)
        if len(configurations) > 1:
            _descend_on_logarithm(trainer, settings.accumulate)
        for callback in (Switching(base, configurations, settings.seed), *callbacks):
            trainer.add_callback(callback)
        roots.clear()  # 400 MB for the embedded model
        release_memory()

    result = train(records, settings, model=base.name, base=base.model, adapt=adapt,
                   identity=[method, *(c.to_json() for c in configurations)],
                   facts=lambda: made[0].facts if made else one | {"grid": family}, **options)
    return result, made[0] if made else None


def train_joint(records: Sequence[Record] | Records, settings: TrainSettings, *,
                model: str = EMBEDDED, **options: Any) -> TrainResult:
    """The methods of `python -m lib train --method`: coa, paper, shared, dedicated.
    The first three train over a `training_set`, the last over the file `settings.configuration`."""
    base = Switchable.load(model, cache_mb=1500)  # to round to some types takes seconds
    if settings.method == "dedicated":
        only = read_json(Path(settings.configuration))
        training_set = [Configuration.from_json(only, base.layers)]
    else:
        training_set = base.training_set(
            [*itertools.islice(records, FELT_BY)], settings.formats, seed=settings.seed,
            learn=settings.learn, tokenizer=load_tokenizer(model, template=settings.template))
    return train_over(base, records, training_set, settings, method=settings.method, **options)[0]


@torch.no_grad()
def start_owned(coa: CoaLora, roots: Sequence[Tensor]) -> None:
    """The components owned by layers of 2 bits start from their mean error in `best_formats`.
    The rows of A without an owner grow by sqrt(r / their number): a step moves B A by the sum
    of |a|^2 over them, so they learn as fast as all r would."""
    base, rank, owned = coa.base, coa.network.rank, coa.network.owned
    formats, shared = [fmt for fmt in best_formats() if fmt.bits == 2], rank - owned
    for index, layer in enumerate(coa.lora_layers.values() if owned else ()):
        learned_a(layer).data[:shared] *= (rank / shared) ** 0.5
        mean = sum(base.weight(index, fmt) for fmt in formats) / len(formats)
        b, a = low_rank(base.weight(index) - mean, roots[index], owned)
        part = layer.scaling[NAME] ** -0.5  # so that (alpha / r) B A is their product
        learned_a(layer).data[shared:] = part * a
        layer.lora_B[NAME].weight.data[:, shared:] = part * b
