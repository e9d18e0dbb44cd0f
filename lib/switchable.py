"""A model whose linear layers change their quantisation in place.

No copy of the model is made: a layer's weight points to the level that the
configuration names. Levels are built from the file's float16 weights and the
last used ones are kept, up to a limit.
"""

import hashlib
from collections import OrderedDict
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lib.base_model import best_dtype, load_model
from lib.configuration import Configuration, Layers, Level, block_linears
from lib.embedded import EMBEDDED
from lib.errors import UserError
from lib.quantize import codebook, rounded


class Switchable:
    """A model, its original weights, and the levels built so far.

    Levels are shared, so nothing may write into a layer's weight: to fold an
    adapter in, materialise it and merge it into a model of its own.

    Attributes:
        model: the model that computes; only the blocks' linears are replaced.
        layers: their names and sizes.
        configuration: the one that the model is at; None is the original.
        grid: codebooks of the levels, as in `lib.quantize.codebook`.
        name: the base model's.
        cache_mb: limit of the levels kept, MB (10^6 bytes); what the model
            is using counts, and is held even where the limit is smaller.
    """

    def __init__(self, model: PreTrainedModel, *, cache_mb: float = 512,
                 dtype: torch.dtype | None = None, grid: str = "nf",
                 name: str = EMBEDDED) -> None:
        codebook(grid, 4)  # an unknown grid shows now
        self.layers = Layers.of(model)
        self._linears = tuple(block_linears(model).values())
        self._originals = tuple(m.weight.data.cpu() for m in self._linears)
        self.model = model.to(dtype or best_dtype())
        self.cache_mb, self.grid, self.name = cache_mb, grid, name
        self.configuration: Configuration | None = None
        self._cache: OrderedDict[tuple[int, Level], Tensor] = OrderedDict()
        self._cached_bytes = 0
        for linear in self._linears:
            linear.weight.requires_grad_(False)

    @classmethod
    def load(cls, model: str = EMBEDDED, **options: object) -> "Switchable":
        """A model by name; `options` as in the class."""
        # The file's own numbers, so that nothing is rounded twice.
        return cls(load_model(model, dtype=torch.float16), name=model, **options)

    def switch(self, configuration: Configuration) -> None:
        """Point every layer to its level; levels that are not kept are built.

        Raises:
            UserError: a configuration of another model's layers.
        """
        self.layers.require_same(configuration.layers)
        try:
            levels = [self._level(i, level) for i, level in enumerate(configuration.levels)]
            for linear, weight in zip(self._linears, levels, strict=True):
                linear.weight.data = weight
            self.configuration = configuration
        finally:
            self._forget()

    def restore(self) -> None:
        """Point every layer to its original weight, in the model's dtype."""
        for linear, original in zip(self._linears, self._originals, strict=True):
            linear.weight.data = original.to(linear.weight, copy=True)
        self.configuration = None

    def weight(self, index: int, level: Level | None = None) -> Tensor:
        """A layer's original weight in float32, or what a level makes of it."""
        original = self._originals[index]
        return original.float() if level is None else self._rounded(index, level)

    def _level(self, index: int, level: Level) -> Tensor:
        key = index, level
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        made = self._build(index, level)
        self._cache[key] = made
        self._cached_bytes += made.nbytes
        return made

    def _build(self, index: int, level: Level) -> Tensor:
        return self._rounded(index, level).to(self._linears[index].weight)

    def _rounded(self, index: int, level: Level) -> Tensor:
        try:
            return rounded(self._originals[index], level, self.grid)
        except UserError as error:
            raise UserError(f"{self.layers.names[index]}: {error}") from None

    def _forget(self) -> None:
        """Drop the levels used longest ago, down to the limit."""
        while self._cached_bytes > self.cache_mb * 1e6 and self._cache:
            self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes

    @property
    def cached_mb(self) -> float:
        """MB of the levels kept now."""
        return self._cached_bytes / 1e6

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the layers' names and of every 101st original weight."""
        total = hashlib.sha256()
        for name, weight in zip(self.layers.names, self._originals, strict=True):
            sample = weight.float().reshape(-1)[::101].contiguous()
            total.update(f"{name} {tuple(weight.shape)}".encode() + sample.numpy().tobytes())
        return total.hexdigest()
