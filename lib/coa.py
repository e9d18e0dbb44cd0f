"""CoA-LoRA: one adapter for every configuration (Ye, Tang, Ngai, arXiv 2509.25214).

A small network U_theta reads how a layer is stored and gives an r x r matrix:
dW = (alpha / r) B (I + U) A. With U = 0 this is LoRA.

Ours has a part that is not learned: components that only layers of some bits
own. U takes them out of all other layers.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lib.artifacts import verified, writing
from lib.configuration import GRID, KINDS, Configuration, Layers, place
from lib.errors import UserError, require
from lib.lora import adapter_files, load_adapter, make_portable
from lib.switchable import Switchable

NAME = "default"
# U is a tenth of what the network says. Adam moves each of its weights by the
# learning rate, whatever the gradient; so U moves at a pace that suits A and B.
PACE = 0.1
# Bits to the share of the rank that only layers of these bits own.
OWNED = {2: 1 / 4}


class MixingNetwork(nn.Module):
    """U_theta: seven embeddings, LayerNorm, two linear layers; the last is zero.

    Reads the five fields of a level, the block's position and the layer's
    kind. All layers go through it at once: (layers, 7) to (layers, r, r).

    U = pace * network(level, block, kind) + diag(gates(bits) - 1), where a gate
    is 0 for a component that layers of other bits own, and 1 for the rest.

    Args:
        owned: bits to the share of the rank; without, all gates are 1.
    """

    def __init__(self, layers: Layers, rank: int, *, width: int = 8, hidden: int = 128,
                 owned: Mapping[int, float] | None = None) -> None:
        super().__init__()
        self.rank, self.width, self.hidden = rank, width, hidden
        self.owned = _components(rank, owned or {})
        gates = torch.ones(1 + len(GRID["bits"]), rank)  # the last row: not quantised
        for bits, rows in self.owned.items():
            gates[:, rows] = 0
            gates[GRID["bits"].index(bits), rows] = 1
        self.register_buffer("gates", gates, persistent=False)
        places = [place(name) for name in layers.names]
        positions = sorted({block for block, _ in places})
        sizes = [*(len(values) for values in GRID.values()), len(positions), len(KINDS)]
        self.embeddings = nn.ModuleList(nn.Embedding(size, width) for size in sizes)
        self.network = nn.Sequential(
            nn.LayerNorm(width * len(sizes)), nn.Linear(width * len(sizes), hidden),
            nn.SiLU(), nn.Linear(hidden, rank * rank))
        nn.init.zeros_(self.network[-1].weight)
        nn.init.zeros_(self.network[-1].bias)
        self.places = [[positions.index(block), KINDS.index(kind)] for block, kind in places]

    def forward(self, configuration: Configuration) -> Tensor:
        """(layers, r, r), float32."""
        rows = [level + where for level, where in
                zip(configuration.indices, self.places, strict=True)]
        index = torch.tensor(rows, device=self.network[1].weight.device)
        read = torch.cat([e(index[:, i]) for i, e in enumerate(self.embeddings)], 1)
        learned = PACE * self.network(read).view(-1, self.rank, self.rank)
        return learned + torch.diag_embed(self.gates[index[:, 0]] - 1)

    def unquantised(self) -> Tensor:
        """(layers, r, r): what nobody owns, unmixed."""
        return torch.diag(self.gates[-1] - 1).expand(len(self.places), -1, -1)


def _components(rank: int, owned: Mapping[int, float]) -> dict[int, list[int]]:
    """Which components the layers of these bits own, counted from the last."""
    found, end = {}, rank
    for bits, share in owned.items():
        count = round(rank * share)
        found[bits], end = [*range(end - count, end)], end - count
    return {bits: rows for bits, rows in found.items() if rows}


class _Mixed(nn.Module):
    """A becomes (I + U) A, of the last forward pass, wherever the layer's A is read."""

    def __init__(self, owner: "CoaLora", index: int) -> None:
        super().__init__()
        self._where = (owner, index)  # in a tuple, so that the owner is no submodule

    def forward(self, a: Tensor) -> Tensor:
        owner, index = self._where
        return a if owner.mixed is None else owner.mixed[index]


def learned_a(layer: nn.Module) -> Tensor:
    """A itself, before U, of a layer that has been made to mix."""
    return layer.lora_A[NAME].parametrizations.weight.original


class CoaLora:
    """A configuration-aware adapter on peft's own LoRA layers.

    Attributes:
        base: the switchable model under it.
        model: the peft model; its forward pass mixes for `base.configuration`.
        network: U_theta, trained with A and B; a submodule of `model`.
        mixers: (layers, r, r), U of the last forward pass.
        mixed: for each layer, (I + U) A of the last forward pass.
    """

    def __init__(self, model: PeftModel, base: Switchable,
                 network: MixingNetwork | None = None) -> None:
        self.model, self.base = model, base
        self.config = model.peft_config[NAME]
        self.network = network or MixingNetwork(base.layers, self.config.r)
        self.network.to(model.device)
        self.mixers: Tensor | None = None
        self.mixed: dict[int, Tensor] | None = None
        self.places = {name: model.get_submodule(f"base_model.model.{name}")
                       for name in base.layers.names}
        for name, layer in self.places.items():
            require(hasattr(layer, "lora_A"),
                    f"{name} has no adapter: train all seven linear layers")
        for index, layer in enumerate(self.places.values()):
            parametrize.register_parametrization(
                layer.lora_A[NAME], "weight", _Mixed(self, index), unsafe=True)
            layer.merge = _refuse_merge
        # Layers of one width are mixed in one product: two hundred small ones, and as
        # many in the backward pass, cost several times as much.
        widths = [layer.in_features for layer in self.places.values()]
        self._alike = [[i for i, w in enumerate(widths) if w == width]
                       for width in sorted({*widths})]
        model.coa_network = self.network
        # peft's own would write the parametrized A, and no theta.
        model.save_pretrained = self.save_pretrained
        # On the model below peft's: generate does not go through peft's forward.
        model.get_base_model().register_forward_pre_hook(self._refresh)

    def _refresh(self, *_: Any) -> None:
        configuration = self.base.configuration
        self.mixers = (self.network.unquantised() if configuration is None
                       else self.network(configuration))
        self.mixed, layers = {}, [*self.places.values()]
        for rows in self._alike:
            a = torch.stack([learned_a(layers[index]) for index in rows])
            self.mixed |= zip(rows, torch.baddbmm(a, self.mixers[rows], a), strict=True)

    def factors(self, configuration: Configuration | None = None, *,
                dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Adapter tensors by peft's names; with a configuration, A is (I + U) A."""
        mixers = None if configuration is None else self.network(configuration).detach()
        tensors = {}
        for index, (name, layer) in enumerate(self.places.items()):
            a = learned_a(layer).detach()
            a = a if mixers is None else torch.addmm(a, mixers[index], a)
            b = layer.lora_B[NAME].weight.detach()
            tensors[f"base_model.model.{name}.lora_A.weight"] = a.to(dtype).contiguous()
            tensors[f"base_model.model.{name}.lora_B.weight"] = b.to(dtype).contiguous()
        return tensors

    def _write(self, part: Path, tensors: dict[str, Tensor]) -> None:
        save_file(tensors, part / "adapter_model.safetensors")
        self.config.save_pretrained(str(part))
        make_portable(part, self.base.name)

    def save_pretrained(self, out: Path | str, *, dtype: torch.dtype = torch.float32,
                        **_: Any) -> None:
        """A and B as peft saves them, and theta beside them: one artifact."""
        network = self.network
        with writing(Path(out), base=self.base.name, base_hash=self.base.fingerprint,
                     grid=self.base.grid, width=network.width, hidden=network.hidden,
                     owned={bits: len(rows) / network.rank
                            for bits, rows in network.owned.items()}) as part:
            self._write(part, self.factors(dtype=dtype))
            save_file(network.state_dict(), part / "coa.safetensors")

    @classmethod
    def from_pretrained(cls, base: Switchable, directory: Path | str) -> "CoaLora":
        """The adapter that `save_pretrained` wrote, on its base.

        Raises:
            UserError: no such adapter, another base, another rank.
        """
        # All is checked before the base gets the adapter.
        directory = Path(directory)
        saved, theta = verified(directory), directory / "coa.safetensors"
        require(theta.is_file(), f"{directory} has no coa.safetensors: it is no "
                "configuration-aware adapter")
        for what, theirs, ours in (("base (hash)", saved.get("base_hash"), base.fingerprint),
                                   ("grid", saved.get("grid"), base.grid)):
            require(theirs == ours, f"{directory} was trained on another {what}: "
                    f"{str(theirs)[:8]}, this one is {ours[:8]}")
        rank = adapter_files(directory)[0]["r"]
        try:
            network = MixingNetwork(
                base.layers, rank, width=saved["width"], hidden=saved["hidden"],
                owned={int(bits): share for bits, share in saved.get("owned", {}).items()})
            network.load_state_dict(load_file(theta))
            require(all(p.isfinite().all() for p in network.parameters()),
                    f"{theta} holds numbers that are not finite: train it again")
        except (SafetensorError, RuntimeError, KeyError, TypeError, ValueError,
                AttributeError) as error:
            raise UserError(f"{theta} does not fit an adapter of rank {rank} "
                            f"({' '.join(str(error).split())[:160]}): make it again") from None
        return cls(load_adapter(base.model, directory), base, network)

    def materialise(self, configuration: Configuration, out: Path | str, *,
                    dtype: torch.dtype = torch.float32) -> None:
        """Write an ordinary peft adapter for one configuration: U is folded into A."""
        self.base.layers.require_same(configuration.layers)
        with writing(Path(out), base=self.base.name, base_hash=self.base.fingerprint,
                     grid=self.base.grid, configuration=configuration.to_json()) as part:
            self._write(part, self.factors(configuration, dtype=dtype))


def _refuse_merge(*_: Any, **__: Any) -> None:
    raise UserError("the base's weights are shared by its configurations: materialise "
                    "the adapter and merge it into a model of its own")
