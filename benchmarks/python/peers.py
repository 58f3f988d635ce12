"""The methods that bench_accuracy.py compares with, each written from its paper alone.

They share nothing with secateur's own criteria: moments, Grams and gradients are taken here, with plain hooks and
autograd, over the same calibration images. Which units stay goes through `sc.Plan` and `sc.prune`, so that every method
leaves the same kind of model, with the dense softmax temperature and the same cost.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import secateur as sc
import torch
from secateur.anatomy import Anatomy, Group, Member, tensor_of
from secateur.anatomy.fingerprint import Fingerprint
from timm.layers import Attention, Mlp
from torch import Tensor, nn
from torch.nn import functional

Sizes = Mapping[str, int]
Keep = dict[str, np.ndarray]
LAMBDAS = (1e-2, 1e-3, 1e-4)


@dataclass(frozen=True)
class Outcome:
    """A pruned copy; ``as_is`` is another form of it where the method's own software leaves another model."""

    model: nn.Module
    as_is: nn.Module | None = None
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Peer:
    """A method: which kinds it cuts, whether query/key and value must keep one size, and what a reader should know.

    ``normed`` are those of the kinds that it can also cut where a norm runs over their units alone.
    """

    kinds: tuple[str, ...]
    note: str
    prune: Callable[[Calibration, Sizes], Outcome]
    tied: bool = False
    normed: tuple[str, ...] = ()

    def kinds_of(self, anatomy: Anatomy) -> tuple[str, ...]:
        """The kinds that it can cut in this model."""
        behind = {group.kind for group in anatomy.groups if any(member.role == "norm" for member in group.members)}
        behind -= {"width"}
        kinds = tuple(kind for kind in self.kinds if kind not in behind or kind in self.normed)
        # One index set for queries, keys and values goes through the norm of each.
        return tuple(kind for kind in kinds if not (self.tied and kind in ("qk", "v") and behind & {"qk", "v"}))


@dataclass
class Moments:
    """Sums over rows of x and x xᵀ, in float64."""

    rows: int
    total: Tensor
    second: Tensor

    @classmethod
    def over(cls, x: Tensor) -> Moments:
        x = x.detach().flatten(0, -2).double()
        return cls(len(x), x.sum(0), x.T @ x)

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.rows + other.rows, self.total + other.total, self.second + other.second)

    @property
    def mean(self) -> Tensor:
        return self.total / self.rows

    @property
    def covariance(self) -> Tensor:
        return self.second / self.rows - torch.outer(self.mean, self.mean)


@dataclass(frozen=True, eq=False)
class Fused:
    """The linear layer that computes the queries and keys of a group, and its rows of each, (heads · size,)."""

    group: Group
    module: str
    query: Tensor
    key: Tensor

    def split(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys of what the layer computes."""
        return out[..., self.query], out[..., self.key]


class Calibration:
    """The calibration images of one draw, and what the dense model does with them, measured when first asked for.

    The last eighth of the images is held out from what is fitted while a regularisation strength is chosen.
    """

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 64) -> None:
        self.model, self.images, self.labels, self.batch_size = model, images, labels, batch_size
        self.anatomy: Anatomy = sc.inspect(model)
        self.device = next(model.parameters()).device
        self.fitted = len(images) - len(images) // 8
        self.solved: dict[Any, Tensor] = {}

    def batches(
        self, first: int = 0, last: int | None = None, size: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        last, size = len(self.images) if last is None else last, size or self.batch_size
        for begin in range(first, last, size):
            end = min(begin + size, last)
            yield self.images[begin:end].to(self.device), self.labels[begin:end].to(self.device)

    @contextmanager
    def hooked(self, name: str, observe: Callable[[Tensor], None], *, output: bool = False) -> Iterator[None]:
        module = self.model.get_submodule(name)
        if output:
            handle = module.register_forward_hook(lambda _module, _args, found: observe(found))
        else:
            handle = module.register_forward_pre_hook(lambda _module, args: observe(args[0]))
        try:
            yield
        finally:
            handle.remove()

    @cached_property
    def readers(self) -> dict[str, str]:
        """Value and FFN groups to the layer that reads them."""
        values = {layer.groups["v"]: layer.writer for layer in self.anatomy.attention}
        return values | {layer.groups["ffn"]: layer.writer for layer in self.anatomy.ffn}

    @cached_property
    def fused(self) -> dict[str, Fused]:
        """Query/key group to the layer that computes them."""
        found = {}
        for layer in self.anatomy.attention:
            group = self.anatomy.group(layer.groups["qk"])
            (query,), (key,) = (group.of("writer", part) for part in ("query", "key"))
            if query.module != key.module:
                raise sc.Unsupported(f"{layer.name}: expected one layer for queries and keys, got two")
            found[group.name] = Fused(group, query.module, *(_places(member, self.device) for member in (query, key)))
        return found

    @cached_property
    def inputs(self) -> dict[str, tuple[Moments, Moments]]:
        """Moments of what enters each reader, over the fitted and over the held-out images."""
        found: dict[str, list[Moments | None]] = {group: [None, None] for group in self.readers}
        for part, (first, last) in enumerate(((0, self.fitted), (self.fitted, len(self.images)))):

            def observe(group: str, x: Tensor, part: int = part) -> None:
                before, now = found[group][part], Moments.over(x)
                found[group][part] = now if before is None else before + now

            self._run(first, last, {layer: _bind(observe, group) for group, layer in self.readers.items()})
        return {group: (pair[0], pair[1]) for group, pair in found.items()}  # type: ignore[misc]

    def moments(self, group: str, *, everything: bool = True) -> Moments:
        fitted, held = self.inputs[group]
        return fitted + held if everything else fitted

    @cached_property
    def variances(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Query/key group to the variances of its queries and of its keys, (heads, size) each."""
        sums: dict[str, Tensor] = {}

        def observe(fused: Fused, out: Tensor) -> None:
            x = torch.cat(fused.split(out.detach().flatten(0, -2)), -1).double()
            sums[fused.group.name] = sums.get(fused.group.name, 0) + torch.stack(
                [x.sum(0), x.square().sum(0), torch.ones_like(x[0]) * len(x)]
            )

        self._run(0, len(self.images), {f.module: _bind(observe, f) for f in self.fused.values()}, output=True)
        found = {}
        for name, fused in self.fused.items():
            total, squares, rows = sums[name]
            variance = (squares / rows - (total / rows).square()).view(2, fused.group.heads, fused.group.size)
            found[name] = (variance[0], variance[1])
        return found

    @cached_property
    def grams(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Query/key group to every image's QᵀQ and KᵀK (keys centred), products in float64, (images, heads, d, d).

        Kept in float32, which is 1e-7 of what a ridge of 1e-4 adds.
        """
        found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self.fused}

        def observe(fused: Fused, out: Tensor) -> None:
            q, k = fused.split(out.detach().double())
            k = k - k.mean(1, keepdim=True)
            pair = (x.unflatten(-1, (fused.group.heads, fused.group.size)).transpose(1, 2) for x in (q, k))
            gram_q, gram_k = ((x.mT @ x).float() for x in pair)
            found[fused.group.name].append((gram_q, gram_k))

        self._run(0, len(self.images), {f.module: _bind(observe, f) for f in self.fused.values()}, output=True)
        return {
            name: (torch.cat([q for q, _ in each]), torch.cat([k for _, k in each])) for name, each in found.items()
        }

    @cached_property
    def taylor(self) -> dict[str, Tensor]:
        """Group to Σ over mini-batches of |Σ w ∂L/∂w|, the inner sum over a unit's parameters, (heads, size)."""
        scores = {
            group.name: torch.zeros(group.heads * group.size, dtype=torch.float64) for group in self.anatomy.groups
        }
        twin = copy.deepcopy(self.model).eval()
        for images, labels in self.batches(size=16):
            twin.zero_grad()
            functional.cross_entropy(twin(images), labels).backward()
            for group in self.anatomy.groups:
                total = torch.zeros_like(scores[group.name])
                for member in group.members:
                    if member.shared:  # by all heads, and no unit's own
                        continue
                    parameter = tensor_of(twin, member.tensor)
                    total += _units(parameter * parameter.grad, group, member).sum(1).double().cpu()
                scores[group.name] += total.abs() * len(images)
        return {group.name: scores[group.name].view(group.heads, group.size) for group in self.anatomy.groups}

    @cached_property
    def held_logits(self) -> Tensor:
        """What the dense model answers on the held-out images."""
        return logits(self.model, self.images[self.fitted :])

    @torch.inference_mode()
    def _run(
        self, first: int, last: int, hooks: Mapping[str, Callable[[Tensor], None]], *, output: bool = False
    ) -> None:
        handles = [self.hooked(name, observe, output=output) for name, observe in hooks.items()]
        for handle in handles:
            handle.__enter__()
        try:
            for images, _ in self.batches(first, last):
                self.model(images)
        finally:
            for handle in handles:
                handle.__exit__(None, None, None)


def _bind(function: Callable[..., None], first: Any) -> Callable[[Tensor], None]:
    return lambda x: function(first, x)


@torch.inference_mode()
def logits(model: nn.Module, images: Tensor, batch_size: int = 128) -> Tensor:
    """What a model answers, on the host, in float64."""
    device = next(model.parameters()).device
    parts = [model(images[i : i + batch_size].to(device)).double().cpu() for i in range(0, len(images), batch_size)]
    return torch.cat(parts)


def divergence(dense: Tensor, other: Tensor) -> float:
    """Mean KL(dense ‖ other) of two sets of logits, in nats."""
    pair = (other.log_softmax(-1), dense.log_softmax(-1))
    return float(functional.kl_div(*pair, reduction="batchmean", log_target=True))


def _places(member: Member, device: torch.device) -> Tensor:
    return torch.from_numpy(member.entries.flatten()).to(device)


def _units(tensor: Tensor, group: Group, member: Member) -> Tensor:
    """One row for each unit of the group, (heads · size, entries)."""
    units = group.heads * group.size
    return tensor.detach().movedim(member.axis, 0)[_places(member, tensor.device)].reshape(units, -1)


def select(scores: Mapping[str, Tensor], anatomy: Anatomy, sizes: Sizes) -> Keep:
    """The highest of every head, sorted; of equal scores the lower index."""
    keep = {}
    for group in anatomy.groups:
        kept = sizes.get(group.name, group.size)
        if kept < group.size:
            order = (-scores[group.name].cpu().double()).argsort(dim=1, stable=True)[:, :kept]
            keep[group.name] = order.sort(dim=1).values.numpy().astype(np.int64)
    return keep


def cut(calibration: Calibration, keep: Keep, method: str, weights: Mapping[str, Tensor] | None = None) -> nn.Module:
    """A pruned copy of the dense model, of which some parameters were replaced before the cut."""
    model, anatomy = copy.deepcopy(calibration.model), calibration.anatomy
    with torch.no_grad():
        for name, weight in (weights or {}).items():
            model.get_parameter(name).copy_(weight)
    sizes = {**anatomy.sizes, **{name: indices.shape[1] for name, indices in keep.items()}}
    plan = sc.Plan(
        method=method,
        options={},
        fingerprint=Fingerprint.of(model, anatomy),
        keep=keep,
        params=(anatomy.params, anatomy.params_at(sizes)),
        macs=(anatomy.macs, anatomy.macs_at(sizes)),
    )
    sc.prune(model, plan)
    return model


def _split(keep: np.ndarray, group: Group) -> tuple[Tensor, Tensor]:
    """Flat indices that stay and that go."""
    stays = torch.zeros(group.heads, group.size, dtype=torch.bool)
    stays.scatter_(1, torch.from_numpy(keep), True)
    return stays.flatten().nonzero()[:, 0], (~stays).flatten().nonzero()[:, 0]


def magnitude(calibration: Calibration, sizes: Sizes) -> Outcome:
    """‖w‖₂ of the rows that write a unit, all of them together: √(‖w_q‖² + ‖w_k‖²) for a query/key pair."""
    scores = {}
    for group in calibration.anatomy.groups:
        total = torch.zeros(group.heads * group.size, dtype=torch.float64)
        for member in group.members:
            if member.role == "writer" and member.parameter == "weight":
                parameter = tensor_of(calibration.model, member.tensor)
                total += _units(parameter, group, member).double().square().sum(1).cpu()
        scores[group.name] = total.sqrt().view(group.heads, group.size)
    return Outcome(cut(calibration, select(scores, calibration.anatomy, sizes), "magnitude"))


def taylor(calibration: Calibration, sizes: Sizes) -> Outcome:
    """|Σ w ∂L/∂w| (Molchanov et al., CVPR 2019), from labels."""
    return Outcome(cut(calibration, select(calibration.taylor, calibration.anatomy, sizes), "taylor"))


def vbp(calibration: Calibration, sizes: Sizes) -> Outcome:
    """Variance-based pruning: what varies least becomes its mean, and that goes into the next layer's bias.

    The paper prunes FFNs; value neurons are done likewise at the input of the projection. A query/key pair is scored
    by the product of its two variances and has nothing that a bias could take.
    """
    anatomy, model = calibration.anatomy, calibration.model
    scores = {name: query * key for name, (query, key) in calibration.variances.items()}
    for name in calibration.readers:
        group = anatomy.group(name)
        scores[name] = calibration.moments(name).covariance.diagonal().view(group.heads, group.size)
    keep = select(scores, anatomy, sizes)
    weights = {}
    for name, layer in calibration.readers.items():
        if name in keep:
            _, gone = _split(keep[name], anatomy.group(name))
            weight, bias = _weight_and_bias(model, layer)
            gone = gone.to(weight.device)
            weights[f"{layer}.bias"] = bias + weight[:, gone] @ calibration.moments(name).mean[gone]
    return Outcome(cut(calibration, keep, "vbp", weights))


def _weight_and_bias(model: nn.Module, layer: str) -> tuple[Tensor, Tensor]:
    module: Any = model.get_submodule(layer)
    if module.bias is None:
        raise sc.Unsupported(f"{layer}: expected a bias, which the peers' compensation needs, got none")
    return module.weight.detach().double(), module.bias.detach().double()


def corp(calibration: Calibration, sizes: Sizes, *, fixed: bool = False) -> Outcome:
    """CORP-style (arXiv:2602.05243): one-shot scores, then closed-form compensation, all solves in float64.

    FFN and value neurons: C_jj ‖w_j‖², and ridge regression of what goes on what stays, over all heads at once, with
    the bias. Query/key pairs: the energy Σ ‖q_i‖²‖k_i‖² of their maps, and M = I + ΔM that minimises
    Σ_images ‖Q_P K_Pᵀ − Q_S ΔM K_Sᵀ‖² + λ‖ΔM‖², solved exactly over the r² unknowns of a head and folded into the
    queries. Here it is given more than its paper has: keys centred over each image's tokens, as softmax ignores what
    that removes, and both λ, relative to the mean diagonal, chosen by the divergence from the dense outputs on
    calibration images held out of the fit. With them the fit is then made on all calibration images. ``fixed`` leaves
    both at the middle of the list.
    """
    anatomy = calibration.anatomy
    calibration.solved.clear()
    scores = {name: torch.einsum("bhii,bhii->hi", q.double(), k.double()) for name, (q, k) in calibration.grams.items()}
    for name, layer in calibration.readers.items():
        group = anatomy.group(name)
        weight, _ = _weight_and_bias(calibration.model, layer)
        diagonal = calibration.moments(name).covariance.diagonal()
        scores[name] = (diagonal * weight.square().sum(0)).view(group.heads, group.size)
    keep = select(scores, anatomy, sizes)

    def compensated(ridge_qk: float, ridge: float, *, everything: bool) -> nn.Module:
        weights: dict[str, Tensor] = {}
        for name, fused in calibration.fused.items():
            if name in keep:
                weights |= _folded_queries(calibration, fused, keep[name], ridge_qk, everything)
        for name, layer in calibration.readers.items():
            if name in keep:
                weights |= _regressed(calibration, name, layer, keep[name], ridge, everything)
        return cut(calibration, keep, "corp", weights)

    def loss(pair: tuple[float, float]) -> float:
        model = compensated(*pair, everything=False)
        return divergence(calibration.held_logits, logits(model, calibration.images[calibration.fitted :]))

    # One at a time from the middle: the two act on different layers.
    middle = LAMBDAS[1]
    if fixed:
        return Outcome(compensated(middle, middle, everything=True))
    ridge = min(LAMBDAS, key=lambda value: loss((middle, value)))
    ridge_qk = min(LAMBDAS, key=lambda value: loss((value, ridge)))
    return Outcome(compensated(ridge_qk, ridge, everything=True), detail={"lambda": ridge, "lambda_qk": ridge_qk})


def _regressed(
    calibration: Calibration, name: str, layer: str, keep: np.ndarray, ridge: float, everything: bool
) -> dict[str, Tensor]:
    key = ("linear", name, keep.shape[1], ridge, everything)
    stays, gone = _split(keep, calibration.anatomy.group(name))
    moments = calibration.moments(name, everything=everything)
    covariance, mean = moments.covariance, moments.mean
    stays, gone = stays.to(mean.device), gone.to(mean.device)
    if key not in calibration.solved:
        inner = covariance[stays][:, stays]
        inner.diagonal().add_(ridge * covariance.diagonal().mean())
        calibration.solved[key] = torch.linalg.solve(inner, covariance[stays][:, gone]).T
    mapped = calibration.solved[key]
    weight, bias = _weight_and_bias(calibration.model, layer)
    lost = weight[:, gone]
    bias = bias + lost @ (mean[gone] - mapped @ mean[stays])
    weight[:, stays] += lost @ mapped
    return {f"{layer}.weight": weight, f"{layer}.bias": bias}


def _folded_queries(
    calibration: Calibration, fused: Fused, keep: np.ndarray, ridge: float, everything: bool
) -> dict[str, Tensor]:
    module: Any = calibration.model.get_submodule(fused.module)
    weight = module.weight.detach().double().clone()
    bias = None if module.bias is None else module.bias.detach().double().clone()
    for head, places in enumerate(fused.query.view(fused.group.heads, fused.group.size)):
        key = ("qk", fused.group.name, head, keep.shape[1], everything)
        stays = torch.from_numpy(keep[head]).to(weight.device)
        if (*key, ridge) not in calibration.solved:
            _solve_pair(calibration, fused.group, head, stays, key, everything)
        matrix = calibration.solved[(*key, ridge)]
        rows = places[stays]
        weight[rows] = matrix.T @ weight[rows]
        if bias is not None:
            bias[rows] = matrix.T @ bias[rows]
    return {f"{fused.module}.weight": weight} | ({} if bias is None else {f"{fused.module}.bias": bias})


def _solve_pair(
    calibration: Calibration, group: Group, head: int, stays: Tensor, key: tuple[Any, ...], everything: bool
) -> None:
    """M of one head for every λ: Σ_b (QᵀQ)_SS ΔM (KᵀK)_SS + λ ΔM = Σ_b (QᵀQ)_SP (KᵀK)_PS, in its r² unknowns."""
    images = len(calibration.images) if everything else calibration.fitted
    query, gram = (each[:images, head].double() for each in calibration.grams[group.name])
    goes = torch.ones(group.size, dtype=torch.bool, device=stays.device)
    goes[stays] = False
    kept = len(stays)
    query_kept, gram_kept = (each[:, stays][:, :, stays] for each in (query, gram))
    wanted = (query[:, stays][:, :, goes] @ gram[:, goes][:, :, stays]).sum(0).flatten() / images
    # (i, j), (k, l) of the product to row (i, k) and column (j, l) of the system.
    system = query_kept.flatten(1).T @ gram_kept.flatten(1) / images
    system = system.view(kept, kept, kept, kept).transpose(1, 2).reshape(kept**2, kept**2)
    scale = system.diagonal().mean()
    identity = torch.eye(kept, dtype=system.dtype, device=system.device)
    for ridge in LAMBDAS:
        regular = system.clone()
        regular.diagonal().add_(ridge * scale)
        change = torch.cholesky_solve(wanted[:, None], torch.linalg.cholesky(regular))
        calibration.solved[(*key, ridge)] = identity + change.view(kept, kept)


def torch_pruning(importance: str) -> Callable[[Calibration, Sizes], Outcome]:
    """Torch-Pruning as its own ViT example has it: head dimensions and FFNs, the embedding width left whole.

    Its counts are set by its ``pruning_ratio_dict``. The copy it prunes itself computes its softmax at 1/√kept where
    attention is fused; the same indices cut with the dense temperature are the row, its own copy is kept beside it.
    """

    def prune(calibration: Calibration, sizes: Sizes) -> Outcome:
        import torch_pruning as tp

        model, anatomy = copy.deepcopy(calibration.model), calibration.anatomy
        blocks = [(layer, model.get_submodule(layer.name)) for layer in anatomy.attention]
        ratios: dict[nn.Module, float] = {}
        roots: dict[nn.Module, tuple[str, ...]] = {}
        inner = []
        for layer, attention in blocks:
            assert isinstance(attention, Attention)
            qk, v = layer.groups["qk"], layer.groups["v"]
            if sizes[qk] != sizes[v]:
                raise sc.Unsupported(f"{layer.name}: Torch-Pruning cuts queries, keys and values alike")
            if sizes[qk] < anatomy.sizes[qk]:
                ratios[attention.qkv] = _ratio(sizes[qk], anatomy.sizes[qk])
                roots[attention.proj] = (qk, v)
                inner.append(attention.proj)
            else:
                inner += [attention.qkv, attention.proj]
        for layer in anatomy.ffn:
            mlp = model.get_submodule(layer.name)
            if not isinstance(mlp, Mlp):
                raise sc.Unsupported(f"{layer.name}: expected an FFN of one branch, got {type(mlp).__name__}")
            ffn = layer.groups["ffn"]
            ratios[mlp.fc1] = _ratio(sizes[ffn], anatomy.sizes[ffn])
            roots[mlp.fc2] = (ffn,)
            inner.append(mlp.fc2)
        channels, height, width = anatomy.input_size
        tokens = ("cls_token", "reg_token", "dist_token", "pos_embed")
        with warnings.catch_warnings():
            # Of the parameters that belong to no layer: all of the width, which stays whole.
            warnings.filterwarnings("ignore", "Unwrapped parameters")
            pruner = tp.pruner.BasePruner(
                model,
                torch.zeros(1, channels, height, width, device=calibration.device),
                importance=(
                    tp.importance.GroupTaylorImportance()
                    if importance == "taylor"
                    else tp.importance.GroupMagnitudeImportance(p=2)
                ),
                pruning_ratio=0.0,
                pruning_ratio_dict=ratios,
                ignored_layers=[*(m for n, m in model.named_modules() if n in ("head", "head_dist")), *inner],
                num_heads={attention.qkv: attention.num_heads for _, attention in blocks},
                prune_head_dims=True,
                round_to=1,
                unwrapped_parameters=[(getattr(model, t), 2) for t in tokens if getattr(model, t, None) is not None],
            )
        if importance == "taylor":
            model.zero_grad()
            for images, labels in calibration.batches():
                functional.cross_entropy(model(images), labels).backward()
        gone: dict[str, list[int]] = {}
        for group in pruner.step(interactive=True):
            for dependency, indices in group:
                if dependency.target.module in roots:
                    for name in roots[dependency.target.module]:
                        gone[name] = sorted({int(index) for index in indices})
            group.prune()
        for _, attention in blocks:
            attention.num_heads = pruner.num_heads[attention.qkv]
            attention.head_dim = attention.qkv.out_features // (3 * attention.num_heads)
            attention.attn_dim = attention.num_heads * attention.head_dim
        model.zero_grad()
        keep = {}
        for name, indices in gone.items():
            group = anatomy.group(name)
            stays = np.setdiff1d(np.arange(group.heads * group.size), indices).reshape(group.heads, -1)
            keep[name] = (stays - group.size * np.arange(group.heads)[:, None]).astype(np.int64)
        repaired = cut(calibration, keep, "torch-pruning")
        # The very weights that it kept itself.
        theirs, ours = dict(model.named_parameters()), dict(repaired.named_parameters())
        assert all(torch.equal(theirs[name], ours[name]) for name in theirs.keys() | ours.keys())
        return Outcome(repaired, as_is=model)

    return prune


def _ratio(kept: int, size: int) -> float:
    # It keeps int(size · (1 − ratio)): half a unit more, so that no rounding can lose one.
    return max(0.0, 1 - (kept + 0.5) / size)


_INNER = ("qk", "v", "ffn")
PEERS: dict[str, Peer] = {
    "magnitude": Peer(
        (*_INNER, "width"),
        "l2 norm of the writing rows; q and k: root of the summed squares",
        magnitude,
        normed=_INNER,
    ),
    "taylor": Peer(
        (*_INNER, "width"),
        "|sum w dL/dw| over a unit's parameters, mini-batches of 16; uses labels",
        taylor,
        normed=_INNER,
    ),
    "vbp": Peer(
        _INNER,
        "variance, mean shift; q/k by the product of variances, as they enter a norm; cannot cut the width",
        vbp,
        normed=("qk",),
    ),
    "corp": Peer(_INNER, "CORP-style and more: values as well, lambda held out; cannot cut the width", corp),
    "corp-paper": Peer(
        ("qk", "ffn"),
        "CORP-style, of what its paper reports: query/key and FFN alone at one ratio, lambda fixed",
        partial(corp, fixed=True),
    ),
    "tp-taylor": Peer(
        _INNER,
        "Torch-Pruning group Taylor, softmax scale repaired; one index set for q, k, v of all heads, width dense",
        torch_pruning("taylor"),
        tied=True,
    ),
    "tp-magnitude": Peer(
        _INNER,
        "Torch-Pruning group magnitude, softmax scale repaired; one index set for q, k, v of all heads, width dense",
        torch_pruning("magnitude"),
        tied=True,
    ),
}


def random_twin(calibration: Calibration, build: Callable[[], nn.Module], sizes: Sizes) -> nn.Module:
    """A model of the pruned sizes with untrained weights: what pruning is worth beyond the shape it finds."""
    dense = build().to(calibration.device).eval()
    shaped = Calibration(dense, calibration.images, calibration.labels)
    scores = {g.name: -torch.arange(g.size).expand(g.heads, g.size).double() for g in shaped.anatomy.groups}
    return cut(shaped, select(scores, shaped.anatomy, sizes), "random")
