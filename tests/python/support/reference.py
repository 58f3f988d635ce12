"""The exactness reference: the dense timm model with what a plan cuts switched off, written without secateur.

Query/key and value neurons: weight rows and biases zeroed; heads: all their values. FFN units: zeroed after the
activation. Residual width, and every norm over cut channels: the norm replaced by one that takes its statistics over
the kept channels only. Attention and FFN layers: what they add to the residual stream is zero.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn


class MaskedNorm(nn.Module):
    """LayerNorm or RMSNorm over the channels where ``mask`` is one; zero elsewhere. ``mask`` (..., d) broadcasts."""

    def __init__(self, norm, mask):
        super().__init__()
        self.norm = norm
        self.register_buffer("mask", mask)
        self.centred = getattr(norm, "centred", "LayerNorm" in type(norm).__name__)

    def forward(self, x):
        mask = self.mask.to(x.dtype)
        count = mask.sum(-1, keepdim=True)
        if self.centred:
            x = x - (x * mask).sum(-1, keepdim=True) / count
        x = x * torch.rsqrt((x * x * mask).sum(-1, keepdim=True) / count + self.norm.eps)
        if self.norm.weight is not None:
            x = x * self.norm.weight
        if getattr(self.norm, "bias", None) is not None:
            x = x + self.norm.bias
        return x * mask


class PerHeadNorm(nn.Module):
    """What MaskedNorm reads of a query/key norm whose scale and shift, (heads, 1, size), are each head's own."""

    def __init__(self, norm, heads, size):
        super().__init__()
        self.eps, self.centred = norm.eps, "LayerNorm" in type(norm).__name__
        self.weight = nn.Parameter(norm.weight.detach().expand(heads, 1, size).clone())
        bias = getattr(norm, "bias", None)
        self.bias = None if bias is None else nn.Parameter(bias.detach().expand(heads, 1, size).clone())


def mask_of(keep, size):
    """(heads, kept) indices to a (heads, size) mask of zeros and ones."""
    keep = torch.as_tensor(np.asarray(keep))
    return torch.zeros(keep.shape[0], size).scatter_(1, keep, 1.0)


def _masked(norm, mask):
    return norm if isinstance(norm, nn.Identity) else MaskedNorm(norm, mask)


class Nothing(nn.Module):
    """Zeros of the input's shape."""

    def forward(self, x):
        return torch.zeros_like(x)


def _mask_input(module, mask):
    module.register_forward_pre_hook(lambda _m, args: (args[0] * mask.to(args[0].dtype), *args[1:]))


@torch.no_grad()
def masked(dense, keep):
    """A copy of ``dense`` (a timm VisionTransformer) that computes what pruning to ``keep`` must.

    ``keep`` maps "blocks.3.qk" (and v, ffn, heads), "width" to kept indices, (heads, kept) or (1, kept), and a layer
    that leaves, "blocks.3.attn" or "blocks.3.mlp", to (1, 0).
    """
    model = copy.deepcopy(dense)
    for index, block in enumerate(model.blocks):
        attn, mlp = block.attn, block.mlp
        heads, dim = attn.num_heads, attn.head_dim
        span = heads * dim
        if f"blocks.{index}.qk" in keep:
            mask = mask_of(keep[f"blocks.{index}.qk"], dim)
            for part in range(2):
                _zero_rows(attn.qkv, slice(part * span, (part + 1) * span), mask.flatten())
            attn.q_norm = _masked(attn.q_norm, mask[:, None])
            attn.k_norm = _masked(attn.k_norm, mask[:, None])
        for layer, branch in (("attn", "drop_path1"), ("mlp", "drop_path2")):
            if np.asarray(keep.get(f"blocks.{index}.{layer}", [[0]])).shape[1] == 0:
                setattr(block, branch, Nothing())
        if {f"blocks.{index}.v", f"blocks.{index}.heads"} & keep.keys():
            values = mask_of(keep.get(f"blocks.{index}.v", np.tile(np.arange(dim), (heads, 1))), dim)
            mask = (values * mask_of(keep.get(f"blocks.{index}.heads", np.arange(heads)[None]), heads).T).flatten()
            _zero_rows(attn.qkv, slice(2 * span, 3 * span), mask)
            attn.norm = _masked(attn.norm, mask)
        if f"blocks.{index}.ffn" in keep:
            mask = mask_of(keep[f"blocks.{index}.ffn"], mlp.fc2.in_features)[0]
            mlp.norm = _masked(mlp.norm, mask)
            _mask_input(mlp.fc2, mask)
    if "width" in keep:
        _mask_width(model, mask_of(keep["width"], model.embed_dim)[0])
    return model


def _zero_rows(linear, rows, mask):
    linear.weight[rows] *= mask[:, None].to(linear.weight.dtype)
    if linear.bias is not None:
        linear.bias[rows] *= mask.to(linear.bias.dtype)


def _mask_width(model, mask):
    if hasattr(model.patch_embed, "norm"):
        model.patch_embed.norm = _masked(model.patch_embed.norm, mask)
    for name in ("norm_pre", "norm", "fc_norm"):
        setattr(model, name, _masked(getattr(model, name), mask))
    for block in model.blocks:
        block.norm1, block.norm2 = _masked(block.norm1, mask), _masked(block.norm2, mask)
    if model.attn_pool is not None:
        pool = model.attn_pool
        _mask_input(pool.kv, mask)
        pool.norm = _masked(pool.norm, mask)
        _mask_input(pool.mlp.fc1, mask)
    for name in ("head", "head_dist"):
        head = getattr(model, name, None)
        if isinstance(head, nn.Linear):
            _mask_input(head, mask)


def outputs_to_compare(output, model, keep):
    """The entries of the masked model's output that the pruned one still has: features lose the cut channels."""
    if isinstance(model.head, nn.Identity) and "width" in keep:
        return output[..., torch.as_tensor(np.asarray(keep["width"]))[0]]
    return output


def random_keep(rng, sizes, fraction=None):
    """A random plan: sizes maps a group to (heads, size); one kept count a group, own indices per head."""
    keep = {}
    for name, (heads, size) in sizes.items():
        count = int(rng.integers(1, size + 1)) if fraction is None else max(1, round(size * fraction))
        keep[name] = np.stack([np.sort(rng.permutation(size)[:count]) for _ in range(heads)]).astype(np.int64)
    return keep


@torch.no_grad()
def randomise(model, seed=0):
    """Fill every parameter (and running statistic) so that no term vanishes: norms, biases, LayerScale, tokens too."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        if "running_var" in name:
            tensor.uniform_(0.5, 1.5, generator=generator)
            continue
        values = torch.empty_like(tensor).normal_(generator=generator)
        if tensor.ndim >= 2 and "token" not in name and "pos_embed" not in name and "latent" not in name:
            values *= tensor[0].numel() ** -0.5
        elif "norm" in name and name.endswith("weight"):
            values = 1 + 0.3 * values
        else:
            values *= 0.3
        tensor.copy_(values)
    return model


@torch.no_grad()
def substituted(dense, plan):
    """The dense-shaped model with a plan's weights: what is cut holds zeros, and norms count the kept channels only.

    Written for timm's modules: which entries of a parameter a kept unit owns is said here once more, by name.
    """
    model = copy.deepcopy(dense)
    width = plan.keep.get("width", np.arange(model.embed_dim)[None])[0]
    for name, value in plan.weights.items():
        module, _, parameter = name.rpartition(".")
        if module.endswith((".q_norm", ".k_norm")):
            _give_heads_their_own(model, plan.keep, module, parameter, value)
            continue
        layer = model.get_submodule(module)
        if getattr(layer, parameter) is None:
            layer.bias = nn.Parameter(layer.weight.new_zeros(len(layer.weight)))
        full = getattr(layer, parameter)
        full.zero_()
        index = [np.arange(size) for size in full.shape]
        for dim, entries in _entries(model, plan.keep, module, parameter, width).items():
            index[dim] = entries
        full[np.ix_(*index)] = value.to(full.dtype)
    for name, eps in plan.eps.items():
        model.get_submodule(name).eps = eps
    for name in plan.uncentred:
        model.get_submodule(name).centred = False
    # Index lists of groups whose weights are all given are done; norms over cut channels still have to know.
    return masked(model, plan.keep)


def _give_heads_their_own(model, keep, module, parameter, value):
    block, _, child = module.removeprefix("blocks.").split(".")
    attn = model.blocks[int(block)].attn
    heads, dim = attn.num_heads, attn.head_dim
    if not isinstance(getattr(attn, child), PerHeadNorm):
        setattr(attn, child, PerHeadNorm(getattr(attn, child), heads, dim))
    full = getattr(getattr(attn, child), parameter)
    staying = torch.as_tensor(keep.get(f"blocks.{block}.heads", np.arange(heads)[None])[0])
    indices = torch.as_tensor(keep[f"blocks.{block}.qk"])[staying]
    full.zero_()
    full[staying[:, None], 0, indices] = value.view(len(staying), -1).to(full.dtype)


def _entries(model, keep, module, parameter, width):
    """Axis to the entries that stay of one parameter of a plain ViT."""
    if module == "":
        return {2: width}
    parts = module.split(".")
    if parts[0] != "blocks" or parts[2] not in ("attn", "mlp"):
        if module in ("head", "head_dist"):
            return {1: width} if parameter == "weight" else {}
        return {0: width}
    block = model.blocks[int(parts[1])]
    heads, dim, span = block.attn.num_heads, block.attn.head_dim, block.attn.num_heads * block.attn.head_dim
    prefix = f"blocks.{parts[1]}"
    whole = np.tile(np.arange(dim), (heads, 1))
    staying = keep.get(f"{prefix}.heads", np.arange(heads)[None])[0]
    qk, v = (
        (keep.get(f"{prefix}.{kind}", whole) + dim * np.arange(heads)[:, None])[staying].flatten()
        for kind in ("qk", "v")
    )
    hidden = keep.get(f"{prefix}.ffn", np.arange(block.mlp.fc2.in_features)[None])[0]
    branches = {"fc1": hidden, "fc1_g": hidden, "fc1_x": hidden}
    branches["norm"] = v if parts[2] == "attn" else hidden
    if parts[3] == "fc1" and block.mlp.fc1.out_features == 2 * block.mlp.fc2.in_features:
        branches["fc1"] = np.concatenate([hidden, hidden + block.mlp.fc2.in_features])
    rows = {"qkv": np.concatenate([qk, qk + span, v + 2 * span]), "gate": v, "proj": width, "fc2": width, **branches}
    columns = {"proj": v, "fc2": hidden}
    found = {0: rows[parts[3]]}
    if parameter == "weight" and parts[3] != "norm":
        found[1] = columns.get(parts[3], width)
    return found
