"""Run calibration images through a model and collect what every method needs, leaving the model as it was."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .. import check, core
from ..anatomy.anatomy import Anatomy
from ..anatomy.fingerprint import Fingerprint
from ..anatomy.layers import AttentionSite, FfnSite, NormSite
from ..core import fallback
from ..data.loader import ImageLoader
from ..data.model_input import data_config, images_in, model_input, split_batch
from ..errors import InvalidArgument, NumericalError, Unsupported
from ..families.registry import family_of
from ..runtime.progress import progress
from ..runtime.ranks import Ranks, joined
from .sensitivity import DISTURBED_IMAGES, measure
from .sensitivity import head_gradients as gradients_of_heads
from .statistics import FOLDS, SAMPLED_IMAGES, Collect, Float, Settings, Statistics


def calibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    max_images: int | None = 1024,
    collect: Collect = "all",
    gamma: int = 8,
    token_fraction: float = 1.0,
    sensitivity: bool = False,
    head_gradients: bool = False,
    resume: str | Path | None = None,
    checkpoint_every: int | None = None,
) -> Statistics:
    """Collect the statistics of a model over images: no labels, no gradients but by request, the model left as it was.

    Query/key importance is SNP's (Shim et al., SNP, ECCV 2024, arXiv:2404.11630): per image, how much each neuron's
    rank-one map agrees with the leading ``gamma`` singular directions of the head's attention scores.

    Under torchrun, or in any initialised process group, all ranks must call this with the same arguments and the same
    weights, each on a device of its own. Each runs its share of the images; all return the sums over all of them, up to
    the order of addition (1e-12) those of one process with the same loader. The ranks go on batch by batch together.
    What is raised on one ends the run on all; so does a rank that dies, or says nothing for an hour (for the seconds
    in SECATEUR_RANK_TIMEOUT). The first rank alone reads and writes ``resume``, and shows progress.

    Args:
        model: a supported timm model, on any device. On a CUDA device the statistics are computed there: by the core
            where it was built with CUDA (``core.runtime.has_cuda()``), or by torch in float64, which is slower.
        loader: batches of images (B, C, H, W), normalised as the model's data configuration says, or sequences whose
            first item they are. It is read once, front to back. On several ranks one of `data.loader` is shared out
            among them batch by batch; any other must give each rank images of its own, and counts as if the ranks' next
            batches always followed one another.
        max_images: stop after exactly this many images; None for all.
        collect: "scores" for query/key importance only, "all" for the second moments of queries, keys, values,
            projection inputs, FFN hidden units and the residual stream as well.
        gamma: leading singular directions that count.
        token_fraction: share of the tokens that feed the moments, rotating from image to image: every k-th token, with
            k = round(1 / token_fraction). Importance uses all tokens.
        sensitivity: more passes over the first 128 images or fewer: how much the output moves when one group's part
            of the model is disturbed, or a layer is missing; see ``Statistics.sensitivity``. Plans weigh errors by it.
        head_gradients: score heads by gradients as well, on the same images; see ``Statistics.head_importance``.
        resume: a statistics file. If it exists, its images are skipped in the loader, which must give the same images
            in the same order, and the sums go on from there. The result is written to it; so is what was collected
            when the loader fails, an image holds NaN or Inf, or the run is interrupted between two batches.
            On several ranks the loader must be of `data.loader`, then their number may change; what was collected is
            written unless a rank died or is interrupted.
        checkpoint_every: also write ``resume`` after every so many batches (of each rank).

    Returns:
        Sums in two folds, even and odd images.

    Raises:
        InvalidArgument: an argument out of range, batches that are no images of the model's size, a ``resume`` file
            of another model or settings, or one of more images than are asked for.
        Unsupported: the model is of no supported family; on several ranks a stream, or ``resume`` with a loader that
            is not of `data.loader`.
        NumericalError: NaN or Inf in an image or a layer; the text names layer and place.
        Error: another rank raised something that is not of secateur, died or hangs.
        OSError: ``resume`` cannot be written.
    """
    with joined() as ranks:
        with ranks.together():
            family = family_of(model)
            anatomy = family.inspect(model)
            max_images = check.integer("max_images", max_images, optional=True)
            gamma = check.integer("gamma", gamma)
            checkpoint_every = check.integer("checkpoint_every", checkpoint_every, optional=True)
            token_fraction = check.fraction("token_fraction", token_fraction, open_low=True)
            _check(loader, collect, resume, checkpoint_every)
            path = None if resume is None else check.writable("resume", resume)
            settings = Settings(
                fingerprint=Fingerprint.of(model, anatomy),
                gamma=gamma,
                collect=collect,
                token_fraction=token_fraction,
                dtype="",
                data=_data_configuration(model),
            )
            collector = _Collector(anatomy, settings)
            if ranks.size > 1 and path is not None and not isinstance(loader, ImageLoader):
                # Which images the others would have had cannot be told from it.
                raise Unsupported(
                    f"resume: expected a loader of data.loader on several ranks, got {type(loader).__name__}"
                )
        _agree(ranks, settings)
        ranks.agree(
            max_images=max_images,
            resume=path is not None,
            checkpoint_every=checkpoint_every,
            sensitivity=sensitivity,
            head_gradients=head_gradients,
        )
        further: list[_Measurement] = []
        if sensitivity:
            further.append(("divergence", lambda first, *share: measure(model, family, anatomy, first, *share)))
        if head_gradients:
            further.append(("gradient", lambda first, *share: gradients_of_heads(model, anatomy, first, *share)))
        return _run(
            model,
            loader,
            collector,
            max_images=max_images,
            further=further,
            path=path,
            every=checkpoint_every,
            ranks=ranks,
        )


def _check(
    loader: object,
    collect: str,
    resume: object,
    checkpoint_every: int | None,
) -> None:
    if collect not in ("scores", "all"):
        raise InvalidArgument(f"collect: expected 'scores' or 'all', got {collect!r}")
    if checkpoint_every is not None and resume is None:
        raise InvalidArgument("checkpoint_every: expected resume= to name the file to write, got none")
    if not isinstance(loader, Iterable):
        raise InvalidArgument(f"loader: expected batches of images, got {type(loader).__name__}")


def _agree(ranks: Ranks, settings: Settings) -> None:
    """Refuse ranks that calibrate different models, or in different ways."""
    first, *others = (Settings.from_dict(fields) for fields in ranks.gather(settings.to_dict()))
    for rank, other in enumerate(others, 1):
        first.fingerprint.require(other.fingerprint, f"rank {rank}: model", strict=True)
    ranks.agree(**{name: value for name, value in settings.to_dict().items() if name != "fingerprint"})


def calibrate_block(
    model: nn.Module, loader: Iterable[Any], block: int | None, *, max_images: int | None, token_fraction: float
) -> Statistics:
    """Statistics of one block's groups alone, from forward passes that end behind it; of all norms where None.

    The arguments are those of ``calibrate`` and have been checked.
    """
    anatomy = family_of(model).inspect(model)
    settings = Settings(Fingerprint.of(model, anatomy), 8, "all", token_fraction, "", _data_configuration(model))
    return _run(model, loader, _Collector(anatomy, settings, only=block, norms=block is None), max_images=max_images)


@contextmanager
def _as_written(model: nn.Module) -> Iterator[None]:
    """Modules that are compiled in place may leave out hooks, on those that do nothing for one: run none of them so."""
    compiled: list[tuple[Any, Any]] = [
        (module, module._compiled_call_impl) for module in model.modules() if module._compiled_call_impl is not None
    ]
    for module, _ in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, run in compiled:
            module._compiled_call_impl = run


# What takes a measurement: the first images, a rank and the number of ranks; and what the measurement is called.
_Take = Callable[[list[torch.Tensor], int, int], dict[str, Float]]
_Measurement = tuple[str, _Take]
_ALONE = Ranks()
# No batch, not even None.
_END = object()


class _EnoughError(Exception):
    """Everything that is observed has been seen; the rest of the forward pass is of no interest."""


def _run(
    model: nn.Module,
    loader: Iterable[Any],
    collector: _Collector,
    *,
    max_images: int | None,
    further: Sequence[_Measurement] = (),
    path: Path | None = None,
    every: int | None = None,
    ranks: Ranks = _ALONE,
) -> Statistics:
    total = images_in(loader, max_images)
    with ranks.together():
        if ranks.size > 1 and isinstance(loader, ImageLoader):
            loader = loader.sharded(ranks.rank, ranks.size, whole_batches=True)
        if ranks.rank == 0 and path is not None and path.is_file():
            collector.restore(Statistics.load(path))
        if max_images is not None and collector.images > max_images:
            raise InvalidArgument(f"resume: expected a file of at most {max_images} images, got {collector.images}")
    collector.follow(ranks)
    seen = collector.images
    end = 0
    first: dict[int, torch.Tensor] = {}
    missing = [take for what, take in further if not any(name.endswith(what) for name in collector.sensitivity)]
    with (
        _as_written(model),
        core.host_by_default(),
        _evaluating(model),
        _kept(collector, path, ranks),
        core.torch_threads(),
        torch.inference_mode(),
    ):
        shown = progress(total, "calibrate", silent=ranks.rank > 0)
        with collector.observing(model), shown as advance:
            for index, (start, images, stop) in enumerate(_batches(model, loader, max_images, seen, ranks)):
                advance(stop - end)
                end = stop
                if missing and start < DISTURBED_IMAGES and len(images) > 0:
                    first[start] = images[: DISTURBED_IMAGES - start].detach().clone()
                if index == 0:
                    with ranks.together():  # a warning may be an error
                        if ranks.rank == 0:
                            _warn_unless_normalised(images, collector.settings.data)
                if end <= seen:
                    continue
                skip = min(len(images), max(0, seen - start))
                with ranks.together(), collector.batch(start + skip, end):
                    if skip < len(images):
                        _forward(model, collector, images[skip:])
                if every and path is not None and (index + 1) % every == 0:
                    _save(collector.statistics(ranks), path, ranks)
        if missing and end >= seen:
            _measure(model, collector, missing, first, ranks)
    if end < seen:
        raise InvalidArgument(f"resume: expected a loader of at least {seen} images, got {seen - end} fewer")
    if collector.images == 0:
        raise InvalidArgument("loader: expected at least one image, got none")
    statistics = collector.statistics(ranks)
    if path is not None and (collector.images > seen or collector.sensitivity):
        _save(statistics, path, ranks)
    return statistics


def _forward(model: nn.Module, collector: _Collector, images: torch.Tensor) -> None:
    with suppress(_EnoughError):
        model(images)
    try:
        collector.wait()
    except NumericalError:
        # A device was not waited for: once more, to learn which value of which layer it is.
        with collector.waiting(), suppress(_EnoughError):
            model(images)
        raise


def _measure(
    model: nn.Module,
    collector: _Collector,
    missing: Sequence[_Take],
    first: Mapping[int, torch.Tensor],
    ranks: Ranks,
) -> None:
    """Take the measurements on the first images; all ranks have these, and a share of the work."""
    parts = ranks.gather({start: images.cpu() for start, images in first.items()}) if ranks.size > 1 else [first]
    found = dict(sorted(item for part in parts for item in part.items()))
    if not found:
        return
    with ranks.together():
        batches = [model_input(model, images) for images in found.values()]
        shares = [take(batches, ranks.rank, ranks.size) for take in missing]
    for share in ranks.gather({name: sums for part in shares for name, sums in part.items()}):
        for name, sums in share.items():
            collector.sensitivity[name] = collector.sensitivity.get(name, 0) + sums


@contextmanager
def _kept(collector: _Collector, path: Path | None, ranks: Ranks) -> Iterator[None]:
    """Write what was collected when the block fails, as long as every layer of every rank has seen its images."""
    before = collector.images
    try:
        yield
    except BaseException as error:
        # Of several ranks only what all of them raise leaves them at one place.
        if path is None or (ranks.size > 1 and (ranks.lost or not isinstance(error, Exception))):
            raise
        if all(ranks.gather(collector.whole)) and (collector.images > before or collector.sensitivity):
            _save(collector.statistics(ranks), path, ranks)
        raise


def _save(statistics: Statistics, path: Path, ranks: Ranks) -> None:
    with ranks.together():
        if ranks.rank == 0:
            statistics.save(path)


def _refuse_non_finite(images: torch.Tensor, start: int) -> None:
    finite = images.isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        first = int((~finite).nonzero()[0, 0])
        value = images[first][~images[first].isfinite()][0].item()
        raise NumericalError(f"patch_embed: expected finite values, got {value} in image {start + first}")


def _batches(
    model: nn.Module, loader: Iterable[Any], max_images: int | None, seen: int, ranks: Ranks
) -> Iterator[tuple[int, torch.Tensor, int]]:
    """This rank's batches as the model takes them, with the number of their first image and of the round's images.

    In each round every rank has a batch, or has come to its end; the images are numbered as if the batches of a round
    followed one another. Exactly ``max_images`` in all, and no round is begun behind them. The first ``seen`` images
    may hold anything.
    """
    source = iter(loader)
    start = 0
    while max_images is None or start < max_images:
        with ranks.together(2 * ranks.size) as told:
            batch = next(source, _END)
            images = torch.empty(0) if batch is _END else split_batch(batch, empty=ranks.size > 1, labels=False)[0]
            if len(images) > 0:
                images = model_input(model, images)
            told[ranks.rank] = len(images)
            told[ranks.size + ranks.rank] = batch is not _END
        if not any(told[ranks.size :]):
            return
        own = start + int(sum(told[: ranks.rank]))
        start += int(sum(told[: ranks.size]))
        if max_images is not None:
            start = min(start, max_images)
            images = images[: max(0, max_images - own)]
        with ranks.together():
            skip = max(0, seen - own)
            if skip < len(images):
                _refuse_non_finite(images[skip:], own + skip)
        yield own, images, start


def _data_configuration(model: nn.Module) -> dict[str, Any]:
    """The model's own data configuration, as JSON values; empty for a model that timm's factory did not make."""
    if not getattr(model, "pretrained_cfg", None):
        return {}
    config = data_config(model)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in sorted(config.items())}


def _warn_unless_normalised(images: torch.Tensor, data: Any) -> None:
    """Pixels in [0, 1] become (x − mean) / std: say so when these cannot have. NaN and Inf are the layers' to name."""
    if not data or len(images) == 0 or not bool(images.isfinite().all()):
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
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; undone whatever happens."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


class _Accumulator(Protocol):
    """What the core's accumulators have in common."""

    def wait(self) -> None: ...

    def state(self) -> dict[str, np.ndarray[Any, Any]]: ...

    def load_state(self, state: Any) -> None: ...


_SAMPLES = ("query_gram", "key_gram")
_T = TypeVar("_T")


class _Collector:
    """Two accumulators, one a fold, for everything that is observed."""

    def __init__(
        self, anatomy: Anatomy, settings: Settings, *, only: int | None = None, norms: bool | None = None
    ) -> None:
        """Observe all of a model, or the groups of block ``only``, or with ``norms`` the norms (and one attention)."""
        self.images = 0
        self.whole = True
        self.anatomy = anatomy
        self.settings = settings
        first = anatomy.group(anatomy.attention[0].qk).block
        blocks = None if norms is None else {first if only is None else only}
        self._attention = [s for s in anatomy.attention if blocks is None or anatomy.group(s.qk).block in blocks]
        self._ffn = [s for s in anatomy.ffn if blocks is None or anatomy.group(s.ffn).block in blocks]
        # In front of query/key norms, whose inputs a change of basis has to know.
        normed = {site.norm for site in self._attention if site.q_norm and site.k_norm}
        self._norms = [norm for norm in anatomy.norms if norms is None or norms or norm.name in normed]
        writers = [*(site.fc2 for site in self._ffn), *(site.proj for site in self._attention)]
        self._last = writers[0] if norms is False else None
        self._dtype = settings.dtype
        self._all = settings.collect == "all"
        self._stride = round(1 / settings.token_fraction)
        self._scorers: dict[str, tuple[core.AttentionScorer, ...]] = {}
        self._moments: dict[str, tuple[core.MomentAccumulator, ...]] = {}
        self._queries: dict[str, torch.Tensor] = {}
        self._samples: dict[str, dict[int, torch.Tensor]] = {}  # by the number of the first image
        self._wait = False  # for the device, layer after layer
        self.sensitivity: dict[str, Float] = {}
        for site in self._attention:
            self._scorers[site.qk] = tuple(
                core.AttentionScorer(site.heads, site.qk_dim, settings.gamma, moments=self._all, name=site.name)
                for _ in FOLDS
            )
            self._accumulate(site.v, site.heads * site.v_dim, f"{site.name} v")
            self._accumulate(site.proj, site.heads * site.v_dim, site.proj)
        for ffn in self._ffn:
            self._accumulate(ffn.ffn, ffn.size, ffn.fc2)
        for norm in self._norms:
            self._accumulate(norm.name, norm.size, norm.name)

    def _accumulate(self, name: str, size: int, layer: str) -> None:
        if self._all and name not in self._moments:
            self._moments[name] = tuple(core.MomentAccumulator(size, name=layer) for _ in FOLDS)

    def _accumulators(self) -> Iterator[tuple[str, _Accumulator]]:
        pairs: dict[str, tuple[_Accumulator, ...]] = {**self._scorers, **self._moments}
        for name, pair in pairs.items():
            for fold, accumulator in zip(FOLDS, pair, strict=True):
                yield f"{fold}/{name}", accumulator

    @contextmanager
    def batch(self, start: int, end: int) -> Iterator[None]:
        """One forward pass of images from number ``start`` on; ``end`` have been seen when all ranks are through.

        If it fails halfway, some layers have seen images that others have not.
        """
        self.whole = False
        self.images = start
        yield
        self.images = end
        self.whole = True

    def wait(self) -> None:
        """Wait for what a device has been given to do.

        Raises:
            NumericalError: a value that was not finite.
        """
        first: NumericalError | None = None
        for _, accumulator in self._accumulators():
            # All of them: what one is left with would be taken for the next batch's.
            try:
                accumulator.wait()
            except NumericalError as error:
                first = first or error
        if first is not None:
            raise first

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Wait for every layer, so that errors come from where they are."""
        self._wait = True
        try:
            yield
        finally:
            self._wait = False

    def statistics(self, ranks: Ranks = _ALONE) -> Statistics:
        """What all ranks have seen; all must ask."""
        tensors = {
            f"{name}/{what}": array
            for name, accumulator in self._accumulators()
            for what, array in accumulator.state().items()
        }
        tensors |= self._sampled()
        ranks.add(torch.from_numpy(array) for array in tensors.values())
        tensors |= {f"sensitivity/{name}": sums for name, sums in self.sensitivity.items()}
        dtypes = sorted({dtype for dtype in ranks.gather(self._dtype) if dtype})
        if len(dtypes) > 1:
            raise InvalidArgument(f"model: expected queries and keys of one type on all ranks, got {dtypes}")
        settings = Settings(**{**vars(self.settings), "dtype": "".join(dtypes)})
        return Statistics(settings, tensors)

    def _sampled(self) -> dict[str, np.ndarray[Any, Any]]:
        """The Grams of the first images at their places; zeros where another rank has them."""
        if not self._all:
            return {}
        found = {}
        for site in self._attention:
            shape = (min(self.images, SAMPLED_IMAGES), site.heads, site.qk_dim * (site.qk_dim + 1) // 2)
            for what in _SAMPLES:
                parts = self._samples.get(f"sample/{site.qk}/{what}", {})
                first = parts.get(0)
                if first is not None and first.is_cuda and len(first) == shape[0]:
                    found[f"sample/{site.qk}/{what}"] = first.cpu().numpy()  # all came at once: no zeros before
                    continue
                grams = np.zeros(shape, np.float32)
                for start, part in parts.items():
                    grams[start : start + len(part)] = part.cpu()
                found[f"sample/{site.qk}/{what}"] = grams
        return found

    def follow(self, ranks: Ranks) -> None:
        """Go on from where the first rank is: its sums stay its own."""
        if ranks.size > 1:
            self.images, self._dtype, self.sensitivity = ranks.gather((self.images, self._dtype, self.sensitivity))[0]

    def restore(self, statistics: Statistics) -> None:
        settings = statistics.settings
        self.settings.fingerprint.require(settings.fingerprint, "resume", strict=True)
        for name in ("gamma", "collect", "token_fraction", "data"):
            mine, found = getattr(self.settings, name), getattr(settings, name)
            if mine != found:
                raise InvalidArgument(f"resume: expected a file of {name} = {mine!r}, got {found!r}")
        for name, accumulator in self._accumulators():
            prefix = f"{name}/"
            state = {k.removeprefix(prefix): v for k, v in statistics.tensors.items() if k.startswith(prefix)}
            accumulator.load_state(state)
        for name, array in statistics.tensors.items():
            kind, _, rest = name.partition("/")
            if kind == "sample":
                self._samples[name] = {0: torch.from_numpy(array)}
            elif kind == "sensitivity":
                self.sensitivity[rest] = array
        self.images, self._dtype = statistics.images, settings.dtype

    @contextmanager
    def observing(self, model: nn.Module) -> Iterator[None]:
        """Every forward pass meanwhile is counted."""
        handles: list[RemovableHandle] = []
        try:
            self._attach(model, handles)
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _attach(self, model: nn.Module, handles: list[RemovableHandle]) -> None:
        for site in self._attention:
            self._attach_attention(model, site, handles)
        if not self._all:
            return
        for ffn in self._ffn:
            handles.append(_on_input(model, ffn.fc2, self._hidden(ffn)))
        for norm in self._norms:
            handles.append(_on_input(model, norm.name, self._norm_input(norm)))
        if self._last is not None:
            handles.append(_on_output(model, self._last, _enough))

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
        """Of a norm's input what the norm lets through: x̂ = x √D / ‖x‖, centred for LayerNorm."""

        def observe(x: torch.Tensor) -> None:
            self._add(site.name, x[:, None] if x.ndim == 2 else x, "layer" if site.centred else "rms")

        return observe

    def _score(self, site: AttentionSite, k: torch.Tensor) -> None:
        q = self._queries.pop(site.name)
        dtype = str(q.dtype).removeprefix("torch.")
        if self._dtype not in ("", dtype):
            raise InvalidArgument(f"resume: expected queries and keys of {self._dtype}, got {dtype}")
        self._dtype = dtype
        q, k = q.detach(), k.detach()
        if self._all and self.images < SAMPLED_IMAGES:
            self._sample(site, q[: SAMPLED_IMAGES - self.images], k[: SAMPLED_IMAGES - self.images])
        fallback.update_scores(self._in_turn(self._scorers[site.qk]), q, k, wait=self._wait)

    def _in_turn(self, pair: Sequence[_T]) -> list[_T]:
        """What the next image is added to, then what the one behind it is."""
        first = self.images % 2
        return [pair[first], pair[1 - first]]

    def _sample(self, site: AttentionSite, q: torch.Tensor, k: torch.Tensor) -> None:
        """Keep the Grams of the first images one by one: what a cut does to an image's own scores needs both at once.

        Packed, in float32: they only measure errors.
        """
        q, k = fallback.at_hand(q), fallback.at_hand(k).double()
        rows, columns = torch.triu_indices(site.qk_dim, site.qk_dim, device=q.device)
        for what, x in zip(_SAMPLES, (q.double(), k - k.mean(1, keepdim=True)), strict=True):
            grams = torch.einsum("bnhi,bnhj->bhij", x, x)
            packed = grams[..., rows, columns].to(torch.float32)
            self._samples.setdefault(f"sample/{site.qk}/{what}", {})[self.images] = packed

    def _add(self, name: str, x: torch.Tensor, norm: fallback.RowNorm = "none") -> None:
        """Add the chosen tokens of (B, N, d) to the fold of their image.

        Image g gives every stride-th token from (g // 2) mod stride on, so both folds see all positions, and the
        choice does not depend on how images are split into batches.
        """
        pair = self._in_turn(self._moments[name])
        stride = min(self._stride, x.shape[1])
        phases = [(self.images + turn) // 2 for turn in range(len(pair))]
        fallback.update_moments(pair, x.detach(), norm=norm, stride=stride, phases=phases, wait=self._wait)


def _enough(_output: torch.Tensor) -> None:
    raise _EnoughError


def _on_output(model: nn.Module, name: str, observe: Callable[[torch.Tensor], None]) -> RemovableHandle:
    return model.get_submodule(name).register_forward_hook(lambda _module, _args, output: observe(output))


def _on_input(model: nn.Module, name: str, observe: Callable[[torch.Tensor], None]) -> RemovableHandle:
    return model.get_submodule(name).register_forward_pre_hook(lambda _module, args: observe(args[0]))
