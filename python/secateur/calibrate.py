"""Run calibration images through a model and collect what every method needs, leaving the model as it was."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from . import core
from .anatomy import Anatomy, AttentionSite, FfnSite, NormSite
from .data import data_config, split_batch
from .errors import InvalidArgument
from .families import family_of
from .identity import Fingerprint
from .progress import progress
from .statistics import FOLDS, Collect, Settings, Statistics


def calibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    max_images: int | None = 1024,
    collect: Collect = "all",
    gamma: int = 8,
    token_fraction: float = 1.0,
    resume: str | Path | None = None,
    checkpoint_every: int | None = None,
) -> Statistics:
    """Collect the statistics of a model over images: no labels, no gradients, the model left as it was.

    Query/key importance is SNP's (Shim et al., SNP, ECCV 2024, arXiv:2404.11630): per image, how much each neuron's
    rank-one map agrees with the leading ``gamma`` singular directions of the head's attention scores.

    Args:
        model: a supported timm model, on any device.
        loader: batches of images (B, C, H, W), normalised as the model's data configuration says, or sequences whose
            first item they are. It is read once, front to back.
        max_images: stop after exactly this many images; None for all.
        collect: "scores" for query/key importance only, "all" for the second moments of queries, keys, values,
            projection inputs, FFN hidden units and the residual stream as well.
        gamma: leading singular directions that count.
        token_fraction: share of the tokens that feed the moments, rotating from image to image: every k-th token, with
            k = round(1 / token_fraction). Importance uses all tokens.
        resume: a statistics file. If it exists, its images are skipped in the loader, which must give the same images
            in the same order, and the sums go on from there; the result is written to it.
        checkpoint_every: also write ``resume`` after every so many batches.

    Returns:
        Sums in two folds, even and odd images.

    Raises:
        InvalidArgument: an argument out of range, batches that are no images, or a ``resume`` file of another model.
        Unsupported: the model is of no supported family.
        NumericalError: NaN or Inf in a layer; the text names layer and place.
    """
    anatomy = family_of(model).inspect(model)
    _check(max_images, collect, gamma, token_fraction, resume, checkpoint_every)
    parameter = next(model.parameters())
    settings = Settings(
        fingerprint=Fingerprint.of(model, anatomy),
        gamma=gamma,
        collect=collect,
        token_fraction=token_fraction,
        dtype="",
        data=_data_configuration(model),
    )
    collector = _Collector(anatomy, settings)
    path = None if resume is None else Path(resume)
    if path is not None and path.is_file():
        collector.restore(Statistics.load(path))
    skip = collector.images
    core.runtime.set_threads(torch.get_num_threads())
    with (
        _observed(model, collector),
        torch.inference_mode(),
        progress(_total(loader, max_images), "calibrate") as advance,
    ):
        for index, images in enumerate(_batches(loader, max_images)):
            if index == 0:
                _warn_unless_normalised(images, settings.data)
            advance(len(images))
            images, skip = images[skip:], max(0, skip - len(images))
            if len(images) == 0:
                continue
            model(images.to(parameter.device, parameter.dtype))
            collector.images += len(images)
            if checkpoint_every and path is not None and (index + 1) % checkpoint_every == 0:
                collector.statistics().save(path)
    if collector.images == 0:
        raise InvalidArgument("loader: expected at least one image, got none")
    statistics = collector.statistics()
    if path is not None:
        statistics.save(path)
    return statistics


def _check(
    max_images: int | None,
    collect: str,
    gamma: int,
    token_fraction: float,
    resume: str | Path | None,
    checkpoint_every: int | None,
) -> None:
    for name, value in (("max_images", max_images), ("gamma", gamma), ("checkpoint_every", checkpoint_every)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise InvalidArgument(f"{name}: expected a positive integer, got {value!r}")
    if collect not in ("scores", "all"):
        raise InvalidArgument(f"collect: expected 'scores' or 'all', got {collect!r}")
    if not 0 < token_fraction <= 1:
        raise InvalidArgument(f"token_fraction: expected a fraction in (0, 1], got {token_fraction!r}")
    if checkpoint_every is not None and resume is None:
        raise InvalidArgument("checkpoint_every: expected resume= to name the file to write, got none")


def _total(loader: Iterable[Any], max_images: int | None) -> int | None:
    """How many images to expect, where that can be known."""
    dataset = getattr(loader, "dataset", None)
    known = len(dataset) if isinstance(dataset, Sized) else None
    return min((n for n in (known, max_images) if n is not None), default=None)


def _batches(loader: Iterable[Any], max_images: int | None) -> Iterator[torch.Tensor]:
    """Batches of images, exactly ``max_images`` in all; the loader is not asked for a batch more than that needs."""
    left = max_images
    for batch in loader:
        images = split_batch(batch)[0][:left]
        if not images.is_floating_point():
            raise InvalidArgument(f"loader: expected floating-point images, got {images.dtype}")
        yield images
        if left is not None:
            left -= len(images)
            if left == 0:
                return


def _data_configuration(model: nn.Module) -> dict[str, Any]:
    """The model's own data configuration, as JSON values; empty for a model that timm's factory did not make."""
    if not getattr(model, "pretrained_cfg", None):
        return {}
    config = data_config(model)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in sorted(config.items())}


def _warn_unless_normalised(images: torch.Tensor, data: Any) -> None:
    """Pixels in [0, 1] become (x − mean) / std: say so when these cannot have. NaN and Inf are the layers' to name."""
    if not data or not bool(images.isfinite().all()):
        return
    mean, std = np.asarray(data["mean"]), np.asarray(data["std"])
    low, high = float(((0 - mean) / std).min()), float(((1 - mean) / std).max())
    least, most = float(images.min()), float(images.max())
    slack = 0.05 * (high - low)
    raw = least >= 0 and low < -slack
    if raw or least < low - slack or most > high + slack:
        warnings.warn(
            f"calibration images range over [{least:.3g}, {most:.3g}], but normalised as the model's data configuration"
            f" says (mean {tuple(data['mean'])}, std {tuple(data['std'])}) they would lie in [{low:.3g}, {high:.3g}]",
            stacklevel=3,
        )


@contextmanager
def _observed(model: nn.Module, collector: _Collector) -> Iterator[None]:
    """Evaluation mode and hooks; both undone whatever happens."""
    modes = [(module, module.training) for module in model.modules()]
    handles: list[RemovableHandle] = []
    try:
        model.eval()
        collector.attach(model, handles)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training


class _Accumulator(Protocol):
    """What the core's accumulators have in common."""

    def state(self) -> dict[str, np.ndarray[Any, Any]]: ...

    def load_state(self, state: Any) -> None: ...


class _Collector:
    """Two accumulators, one a fold, for everything that is observed."""

    def __init__(self, anatomy: Anatomy, settings: Settings) -> None:
        self.images = 0
        self._anatomy = anatomy
        self._settings = settings
        self._dtype = settings.dtype
        self._all = settings.collect == "all"
        self._stride = round(1 / settings.token_fraction)
        self._scorers: dict[str, tuple[core.AttentionScorer, ...]] = {}
        self._moments: dict[str, tuple[core.MomentAccumulator, ...]] = {}
        self._queries: dict[str, torch.Tensor] = {}
        for site in anatomy.attention:
            self._scorers[site.qk] = tuple(
                core.AttentionScorer(site.heads, site.qk_dim, settings.gamma, moments=self._all, name=site.name)
                for _ in FOLDS
            )
            self._accumulate(site.v, site.heads * site.v_dim, f"{site.name} v")
            self._accumulate(site.proj, site.heads * site.v_dim, site.proj)
        for ffn in anatomy.ffn:
            self._accumulate(ffn.ffn, ffn.size, ffn.fc2)
        for norm in anatomy.norms:
            self._accumulate(_stream(norm), norm.size, norm.name)

    def _accumulate(self, name: str, size: int, layer: str) -> None:
        if self._all and name not in self._moments:
            self._moments[name] = tuple(core.MomentAccumulator(size, name=layer) for _ in FOLDS)

    def _accumulators(self) -> Iterator[tuple[str, _Accumulator]]:
        pairs: dict[str, tuple[_Accumulator, ...]] = {**self._scorers, **self._moments}
        for name, pair in pairs.items():
            for fold, accumulator in zip(FOLDS, pair, strict=True):
                yield f"{fold}/{name}", accumulator

    def statistics(self) -> Statistics:
        tensors = {
            f"{name}/{what}": array
            for name, accumulator in self._accumulators()
            for what, array in accumulator.state().items()
        }
        settings = Settings(**{**vars(self._settings), "dtype": self._dtype})
        return Statistics(settings, tensors)

    def restore(self, statistics: Statistics) -> None:
        settings = statistics.settings
        self._settings.fingerprint.require(settings.fingerprint, "resume", strict=True)
        for name in ("gamma", "collect", "token_fraction", "data"):
            mine, found = getattr(self._settings, name), getattr(settings, name)
            if mine != found:
                raise InvalidArgument(f"resume: expected a file of {name} = {mine!r}, got {found!r}")
        for name, accumulator in self._accumulators():
            prefix = f"{name}/"
            state = {k.removeprefix(prefix): v for k, v in statistics.tensors.items() if k.startswith(prefix)}
            accumulator.load_state(state)
        self.images, self._dtype = statistics.images, settings.dtype

    def attach(self, model: nn.Module, handles: list[RemovableHandle]) -> None:
        for site in self._anatomy.attention:
            self._attach_attention(model, site, handles)
        if not self._all:
            return
        for ffn in self._anatomy.ffn:
            handles.append(_on_input(model, ffn.fc2, self._hidden(ffn)))
        for norm in self._anatomy.norms:
            handles.append(_on_input(model, norm.name, self._norm_input(norm)))

    def _attach_attention(self, model: nn.Module, site: AttentionSite, handles: list[RemovableHandle]) -> None:
        split = [site.heads * site.qk_dim, site.heads * site.qk_dim, site.heads * site.v_dim]

        def on_qkv(qkv: torch.Tensor) -> None:
            q, k, v = qkv.split(split, dim=-1)
            if site.q_norm is None:
                self._queries[site.name] = q.unflatten(-1, (site.heads, -1))
            if site.k_norm is None:
                self._score(site, k.unflatten(-1, (site.heads, -1)))
            if self._all:
                self._add(site.v, v)

        # Queries come first in every forward pass; the scores are taken when the keys are there.
        handles.append(_on_output(model, site.qkv, on_qkv))
        if site.q_norm is not None:
            handles.append(
                _on_output(model, site.q_norm, lambda q: self._queries.update({site.name: q.transpose(1, 2)}))
            )
        if site.k_norm is not None:
            handles.append(_on_output(model, site.k_norm, lambda k: self._score(site, k.transpose(1, 2))))
        if self._all:
            handles.append(_on_input(model, site.proj, lambda z: self._add(site.proj, z)))

    def _hidden(self, site: FfnSite) -> Callable[[torch.Tensor], None]:
        return lambda hidden: self._add(site.ffn, hidden)

    def _norm_input(self, site: NormSite) -> Callable[[torch.Tensor], None]:
        """Every norm input counts alike: x̂ = x √D / ‖x‖, centred for LayerNorm."""

        def observe(x: torch.Tensor) -> None:
            x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
            if x.ndim == 2:
                x = x[:, None]
            if site.centred:
                x = x - x.mean(-1, keepdim=True)
            norm = x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
            self._add(_stream(site), x * (x.shape[-1] ** 0.5 / norm))

        return observe

    def _score(self, site: AttentionSite, k: torch.Tensor) -> None:
        q = self._queries.pop(site.name)
        self._dtype = str(q.dtype).removeprefix("torch.")
        q, k = _on_host(q), _on_host(k)
        for fold, scorer in enumerate(self._scorers[site.qk]):
            start = (fold - self.images) % 2
            if start < len(q):
                scorer.update(q[start::2], k[start::2])

    def _add(self, name: str, x: torch.Tensor) -> None:
        """Add the chosen tokens of (B, N, d) to the fold of their image, as strided views.

        Image g gives every stride-th token from (g // 2) mod stride on, so both folds see all positions, and the
        choice does not depend on how images are split into batches.
        """
        x = _on_host(x)
        stride = min(self._stride, x.shape[1])
        for residue in range(2 * stride):
            start = (residue - self.images) % (2 * stride)
            rows = x[start :: 2 * stride, residue // 2 :: stride]
            if rows.numel():
                self._moments[name][residue % 2].update(rows)


def _stream(site: NormSite) -> str:
    return "stream.pooled" if site.pooled else "stream"


def _on_host(x: torch.Tensor) -> torch.Tensor:
    return x.detach() if x.device.type == "cpu" else x.detach().cpu()


def _on_output(model: nn.Module, name: str, observe: Callable[[torch.Tensor], None]) -> RemovableHandle:
    return model.get_submodule(name).register_forward_hook(lambda _module, _args, output: observe(output))


def _on_input(model: nn.Module, name: str, observe: Callable[[torch.Tensor], None]) -> RemovableHandle:
    return model.get_submodule(name).register_forward_pre_hook(lambda _module, args: observe(args[0]))
