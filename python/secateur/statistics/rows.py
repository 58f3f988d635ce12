"""Weights of tokens in second moments, so that neither a few massive tokens nor those nobody reads rule a fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..anatomy import Anatomy, Layer
from ..errors import InvalidArgument
from ..families.base import NORMS
from .settings import Float

__all__ = ["RowWeights", "after_layers", "spread"]

# What norms add to the variance where a layer has no norm before it.
_EPS = 1e-6


class RowWeights:
    """w_t = ½ · v̄ / v_t + ½ · g_kind / ḡ for each token of each layer; their mean over tokens is about one.

    v_t is the variance of the residual stream after the layer over a token's channels (the mean square where norms are
    RMSNorms), which the next norm divides by: the massive tokens of large models count like all others. v̄ is its
    harmonic mean. g_kind is the mean squared gradient of the output at prefix tokens or at patches, ḡ that of all
    tokens: where only the class token is read, it counts for half of everything. All but v_t comes from the measurement
    "rows".

    Args:
        model: the dense model.
        anatomy: its description.
        prefix: number of prefix tokens.
        sums: the measurement's sums, by "layer/rows".
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, prefix: int, sums: Mapping[str, Float]) -> None:
        self._model, self._anatomy, self._prefix = model, anatomy, prefix
        self._means: dict[str, tuple[float, float, float]] = {}
        for name, (at_prefix, at_patches, inverses, prefixes, patches, _) in sums.items():
            tokens = prefixes + patches
            if not tokens > 0:
                raise InvalidArgument("loader: expected at least one image, got none")
            mean = (at_prefix + at_patches) / tokens
            shares = [
                part / count / mean if count > 0 and mean > 0 else 1.0
                for part, count in ((at_prefix, prefixes), (at_patches, patches))
            ]
            # Twelve digits, so that the order in which ranks add up makes no difference.
            level, first, others = (float(f"{each:.11e}") for each in (tokens / inverses, *shares))
            self._means[name.removesuffix("/rows")] = (level, first, others)

    def of(self, layer: str, stream: Tensor) -> Tensor:
        """Return the weights of tokens, (B, N), given the dense model's stream after the layer, (B, N, width)."""
        level, prefix, patches = self._means[layer]
        weights = 0.5 * level / spread(self._model, self._anatomy.layers[layer], stream)
        weights[:, : self._prefix] += 0.5 * prefix
        weights[:, self._prefix :] += 0.5 * patches
        return weights


def spread(model: nn.Module, layer: Layer, stream: Tensor) -> Tensor:
    """Return what a norm of the layer's kind divides tokens by, squared: (B, N) in float64, eps included."""
    norm = None if layer.input_norm is None else model.get_submodule(layer.input_norm)
    x = stream.double()
    # RMSNorms have no mean to subtract, so all of a token's length counts.
    found = x.square().mean(-1) if _uncentred(norm) else x.var(-1, unbiased=False)
    return found + float(getattr(norm, "eps", _EPS) or _EPS)


def after_layers(
    model: nn.Module, layers: Iterable[Layer], seen: Callable[[str, Tensor], None]
) -> list[RemovableHandle]:
    """Hook a model so that forward passes call ``seen`` with a layer's name and the stream after it, (B, N, width)."""
    before: dict[str, Tensor] = {}

    def enters(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, args: before.__setitem__(name, args[0].detach())

    def leaves(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda _module, _args, output: seen(name, before.pop(name) + output.detach())

    handles = []
    for layer in layers:
        module = model.get_submodule(layer.input_norm or layer.name)
        handles.append(module.register_forward_pre_hook(enters(layer.name)))
        handles.append(model.get_submodule(layer.branch).register_forward_hook(leaves(layer.name)))
    return handles


def _uncentred(norm: nn.Module | None) -> bool:
    return norm is not None and NORMS.get(type(norm)) is False
