"""CoA-LoRA: one adapter for every configuration (Ye, Tang, Ngai, arXiv 2509.25214).

A small network U_theta reads a layer's format and gives an r x r matrix:
dW = (alpha / r) B (I + U) A. With U = 0 this is LoRA.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lib.base.model import MODULE_KINDS
from lib.coa.configuration import Configuration, Layers, Switchable, block_and_kind
from lib.errors import UserError, require
from lib.files import verified, writing
from lib.quantize.formats import GRID
from lib.train.lora import adapter_files, load_adapter, make_portable

NAME = "default"
# U is a tenth of the network's output: Adam moves each weight by about the learning rate
# regardless of its gradient, and U should move at a pace that suits A and B.
PACE = 0.1
WIDTH, HIDDEN = 8, 128  # of an embedding, and between the two linear layers
OWNED = 1 / 4  # the share of the rank that only layers of 2 bits use


class MixingNetwork(nn.Module):
    """U_theta: seven embeddings, LayerNorm, two linear layers, the last one zero at the start.

    U = pace * network(five fields of a format, block, kind) + diag(gates(bits) - 1), for all
    layers at once, (layers, 7) to (layers, r, r). The gates are ours and not learned: 1, and 0 for
    the last components, an `owned` share of the rank, in layers that do not have 2 bits.
    """

    def __init__(self, layers: Layers, rank: int, *, owned: float = 0) -> None:
        super().__init__()
        self.rank, self.owned = rank, round(rank * owned)  # numbers of components
        gates = torch.ones(1 + len(GRID["bits"]), rank)  # the last row: not quantised
        gates[1:, rank - self.owned:] = 0  # the first row: 2 bits
        self.register_buffer("gates", gates, persistent=False)
        places = [block_and_kind(name) for name in layers.names]
        blocks = sorted({block for block, _ in places})
        self.places = [[blocks.index(block), MODULE_KINDS.index(kind)] for block, kind in places]
        sizes = [*(len(values) for values in GRID.values()), len(blocks), len(MODULE_KINDS)]
        self.embeddings = nn.ModuleList(nn.Embedding(size, WIDTH) for size in sizes)
        self.network = nn.Sequential(
            nn.LayerNorm(WIDTH * len(sizes)), nn.Linear(WIDTH * len(sizes), HIDDEN),
            nn.SiLU(), nn.Linear(HIDDEN, rank * rank))
        nn.init.zeros_(self.network[-1].weight)
        nn.init.zeros_(self.network[-1].bias)

    def forward(self, configuration: Configuration | None) -> Tensor:
        """(layers, r, r), float32. Without a configuration only the gates act."""
        if configuration is None:
            return torch.diag(self.gates[-1] - 1).expand(len(self.places), -1, -1)
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
    `mixers`, (layers, r, r), and (I + U) A in `mixed`. `network` is trained with A and B.
    """

    def __init__(self, model: PeftModel, base: Switchable,
                 network: MixingNetwork | None = None) -> None:
        self.model, self.base = model, base
        self.config = model.peft_config[NAME]
        self.network = network or MixingNetwork(base.layers, self.config.r)
        self.network.to(model.device)
        self.mixers: Tensor | None = None
        self.mixed: dict[int, Tensor] = {}
        self.lora_layers = {name: model.get_submodule(f"base_model.model.{name}")
                            for name in base.layers.names}
        for index, (name, layer) in enumerate(self.lora_layers.items()):
            require(hasattr(layer, "lora_A"),
                    f"{name} has no adapter: train all seven linear layers")
            parametrize.register_parametrization(
                layer.lora_A[NAME], "weight", _Mixed(self, index), unsafe=True)
            layer.merge = _refuse_merge
        model.coa_network = self.network
        # peft's own method would write the parametrised A, and not theta.
        model.save_pretrained = self.save_pretrained
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

    def factors(self, configuration: Configuration | None = None, *,
                dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Adapter tensors by peft's names. With a configuration, A is (I + U) A."""
        mixers = None if configuration is None else self.network(configuration).detach()
        tensors = {}
        for index, (name, layer) in enumerate(self.lora_layers.items()):
            a, b = learned_a(layer).detach(), layer.lora_B[NAME].weight.detach()
            a = a if mixers is None else torch.addmm(a, mixers[index], a)
            for factor, tensor in (("A", a), ("B", b)):
                key = f"base_model.model.{name}.lora_{factor}.weight"
                tensors[key] = tensor.to(dtype).contiguous()
        return tensors

    def _write(self, part: Path, tensors: dict[str, Tensor]) -> None:
        save_file(tensors, part / "adapter_model.safetensors")
        self.config.save_pretrained(str(part))
        make_portable(part, self.base.name)

    def save_pretrained(self, out: Path | str, *, dtype: torch.dtype = torch.float32,
                        **_: Any) -> None:
        """Write one artifact: A and B as peft saves them, and theta beside them."""
        owned = {"2": self.network.owned / self.network.rank}
        with writing(Path(out), base=self.base.name, base_hash=self.base.fingerprint, grid="nf",
                     width=WIDTH, hidden=HIDDEN, owned=owned) as part:
            self._write(part, self.factors(dtype=dtype))
            save_file(self.network.state_dict(), part / "coa.safetensors")

    @classmethod
    def from_pretrained(cls, base: Switchable, directory: Path | str) -> "CoaLora":
        """The adapter that `save_pretrained` wrote, on its base; UserError if it does not fit."""
        # The base stays as it is until all files have passed.
        directory = Path(directory)
        manifest, theta = verified(directory), directory / "coa.safetensors"
        require(theta.is_file(),
                f"{directory} has no coa.safetensors: it is not a configuration-aware adapter")
        for key, ours in (("base_hash", base.fingerprint), ("grid", "nf")):
            theirs = str(manifest.get(key))
            require(theirs == ours, f"{directory} was trained on another {key.split('_')[0]}: "
                    f"{key} is {theirs[:8]}, this one has {ours[:8]}")
        owned = manifest.get("owned", {}).get("2", 0)
        network = MixingNetwork(base.layers, adapter_files(directory)[0]["r"], owned=owned)
        network.load_state_dict(load_file(theta))
        return cls(load_adapter(base.model, directory), base, network)

    def materialise(self, configuration: Configuration, out: Path | str, *,
                    dtype: torch.dtype = torch.float32) -> None:
        """Write an ordinary peft adapter for one configuration, with U folded into A."""
        self.base.layers.require_same(configuration.layers)
        with writing(Path(out), base=self.base.name, base_hash=self.base.fingerprint,
                     grid="nf", configuration=configuration.to_json()) as part:
            self._write(part, self.factors(configuration, dtype=dtype))


def _refuse_merge(*_: Any, **__: Any) -> None:
    raise UserError("the base's weights are shared by its configurations: materialise "
                    "the adapter and merge it into a separate model")
