"""A model whose linear layers change their format in place."""

import hashlib
from collections import OrderedDict
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lib.base.embedded import EMBEDDED
from lib.base.model import best_dtype, load_model
from lib.coa.configuration import Configuration, Layers, block_linears
from lib.errors import UserError
from lib.quantize.formats import Format, round_trip


class Switchable:
    """A model, its original weights, and a cache of its layers in other formats.

    The model is never copied: a layer's weight points to the dequantised tensor of its format,
    built from the file's float16 weights. Cached tensors are shared, so nothing may write into
    a layer's weight. `cache_mb`, MB, limits the cache; weights in use count, and stay in any
    case. `configuration` is the current one, None for the original weights.
    """

    def __init__(self, model: PreTrainedModel, *, cache_mb: float = 512,
                 dtype: torch.dtype | None = None, name: str = EMBEDDED) -> None:
        self.layers = Layers.of(model)
        self._linears = tuple(block_linears(model).values())
        self._originals = tuple(m.weight.data.cpu() for m in self._linears)
        self.model = model.to(dtype or best_dtype())
        self.cache_mb, self.name = cache_mb, name
        self.configuration: Configuration | None = None
        self._cache: OrderedDict[tuple[int, Format], Tensor] = OrderedDict()
        for linear in self._linears:
            linear.weight.requires_grad_(False)

    @classmethod
    def load(cls, model: str = EMBEDDED, **options: object) -> "Switchable":
        """A model by name; `options` as in the class."""
        # In the file's own precision, so that nothing is rounded twice.
        return cls(load_model(model, dtype=torch.float16), name=model, **options)

    def switch(self, configuration: Configuration) -> None:
        """Point every layer to its weight in the configuration's format."""
        self.layers.require_same(configuration.layers)
        try:
            # All are built before the first is set: a failure leaves the model as it was.
            weights = [self._cached(i, fmt) for i, fmt in enumerate(configuration.formats)]
            for linear, weight in zip(self._linears, weights, strict=True):
                linear.weight.data = weight
            self.configuration = configuration
        finally:
            while self.cached_mb > self.cache_mb and self._cache:
                self._cache.popitem(last=False)

    def restore(self) -> None:
        """Point every layer to its original weight, in the model's dtype."""
        for linear, original in zip(self._linears, self._originals, strict=True):
            linear.weight.data = original.to(linear.weight, copy=True)
        self.configuration = None

    def weight(self, index: int, fmt: Format | None = None) -> Tensor:
        """A layer's original weight, or that weight as a format gives it back, in float32."""
        if fmt is None:
            return self._originals[index].float()
        try:
            return round_trip(self._originals[index], fmt)
        except UserError as error:
            raise UserError(f"{self.layers.names[index]}: {error}") from None

    def _cached(self, index: int, fmt: Format) -> Tensor:
        key = index, fmt
        if key not in self._cache:
            self._cache[key] = self._build(index, fmt)
        self._cache.move_to_end(key)
        return self._cache[key]

    def _build(self, index: int, fmt: Format) -> Tensor:
        return self.weight(index, fmt).to(self._linears[index].weight)

    @property
    def cached_mb(self) -> float:
        """MB that the cache holds."""
        return sum(tensor.nbytes for tensor in self._cache.values()) / 1e6

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the layers' names and of every 101st original weight."""
        digest = hashlib.sha256()
        for name, weight in zip(self.layers.names, self._originals, strict=True):
            sample = weight.float().reshape(-1)[::101].contiguous()
            digest.update(f"{name} {tuple(weight.shape)}".encode() + sample.numpy().tobytes())
        return digest.hexdigest()
