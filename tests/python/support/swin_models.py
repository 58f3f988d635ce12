"""Small, odd-sized SwinTransformers, and what pruning must make of them, written without the code under test."""

from __future__ import annotations

import copy

import numpy as np
import timm
import torch
from reference import MaskedNorm, Nothing, mask_of, randomise
from secateur.data.loader import loader
from timm.layers import RmsNorm
from timm.models.swin_transformer import SwinTransformer
from torch import nn
from torch.nn import functional

# Stage 0: 14 x 8 places, windows padded to 16 x 8; stage 1: 7 x 4, padded to 8 x 4 and shifted. Heads of 9 and 7.
BASE = {
    "img_size": (56, 32),
    "patch_size": 4,
    "embed_dim": 27,
    "depths": (1, 2),
    "num_heads": (3, 5),
    "head_dim": (9, 7),
    "window_size": 4,
    "mlp_ratio": 1.7,
    "num_classes": 7,
}
# No window is padded; the second block of each stage is shifted.
FITTING = {"img_size": (64, 32), "window_size": (4, 2), "depths": (2, 2)}

KINDS = {
    "padded": {},
    "fitting": FITTING,
    "wide": {"img_size": 32, "embed_dim": 40, "num_heads": (2, 4), "head_dim": None, "mlp_ratio": 4.0},
    "three_stages": {"depths": (1, 1, 1), "num_heads": (3, 2, 4), "head_dim": (5, 9, 3), "embed_dim": 15},
    "one_stage": {"depths": (2,), "num_heads": (3,), "head_dim": 9},
    "always_partition": {"always_partition": True, "window_size": 8},
    "any_size": {"dynamic_img_size": True},
    "rms_norm": {"norm_layer": RmsNorm},
    "no_qkv_bias": {"qkv_bias": False},
    "no_pool": {"global_pool": ""},
    "max_pool": {"global_pool": "max"},
    "both_pools": {"global_pool": "catavgmax"},
    "features": {"num_classes": 0},
}


def make(kind, seed=0):
    """A model of this kind with weights that leave no term at zero, in evaluation mode."""
    model = randomise(SwinTransformer(**{**BASE, **KINDS[kind]}), seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias_table"):
                parameter.mul_(parameter[0].numel() ** 0.5)  # entries of 1, not of a matrix of so many inputs
    return model.eval()


def images(model, batch=2, seed=0):
    """Images in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, model.in_chans, *model.patch_embed.img_size, generator=generator) * 2 - 1


@torch.no_grad()
def masked(dense, keep):
    """A copy of a dense model that computes what pruning to ``keep`` must.

    Queries, keys and values: weight rows and biases zeroed; heads: all their values. FFN units: zeroed after the
    activation. Widths: every norm takes its statistics over the kept channels, that of patch merging over four times as
    many. Layers that are gone add zero.
    """
    model = copy.deepcopy(dense)
    stages = list(model.layers)
    for index, stage in enumerate(stages):
        for number, block in enumerate(stage.blocks):
            _mask_block(
                block, {k.rpartition(".")[2]: v for k, v in keep.items() if f"layers.{index}.blocks.{number}." in k}
            )
        if f"layers.{index}.width" in keep:
            mask = mask_of(keep[f"layers.{index}.width"], len(stage.blocks[0].norm1.weight))[0]
            if index == 0:
                model.patch_embed.norm = MaskedNorm(model.patch_embed.norm, mask)
            for block in stage.blocks:
                block.norm1, block.norm2 = MaskedNorm(block.norm1, mask), MaskedNorm(block.norm2, mask)
            if index + 1 < len(stages):
                merging = stages[index + 1].downsample
                merging.norm = MaskedNorm(merging.norm, mask.repeat(4))
            else:
                model.norm = MaskedNorm(model.norm, mask)
    return model


def _mask_block(block, keep):
    attn, mlp = block.attn, block.mlp
    heads, dim = attn.num_heads, attn.qkv.out_features // 3 // attn.num_heads
    if "qk" in keep:
        mask = mask_of(keep["qk"], dim).flatten().repeat(2)
        _mask_rows(attn.qkv, slice(0, 2 * heads * dim), mask)
    if {"v", "heads"} & keep.keys():
        mask = mask_of(keep.get("v", np.tile(np.arange(dim), (heads, 1))), dim)
        mask = mask * mask_of(keep.get("heads", np.arange(heads)[None]), heads).T
        _mask_rows(attn.qkv, slice(2 * heads * dim, None), mask.flatten())
    if "ffn" in keep:
        mask = mask_of(keep["ffn"], mlp.fc2.in_features)[0]
        mlp.fc2.register_forward_pre_hook(lambda _m, args: (args[0] * mask.to(args[0].dtype),))
    for layer, branch in (("attn", "drop_path1"), ("mlp", "drop_path2")):
        if layer in keep:
            assert np.asarray(keep[layer]).shape[1] == 0
            setattr(block, branch, Nothing())


def _mask_rows(linear, rows, mask):
    linear.weight[rows] *= mask[:, None].to(linear.weight.dtype)
    if linear.bias is not None:
        linear.bias[rows] *= mask.to(linear.bias.dtype)


def outputs_to_compare(output, model, keep):
    """The entries of the masked model's output that the pruned one still has: features lose the cut channels."""
    last = f"layers.{len(model.layers) - 1}.width"
    if isinstance(model.head.fc, nn.Identity) and last in keep:
        return output[..., torch.as_tensor(np.asarray(keep[last]))[0]]
    return output


@torch.no_grad()
def substituted(dense, plan):
    """The dense-shaped model with a plan's weights: what is cut holds zeros, and norms count the kept channels only."""
    model = copy.deepcopy(dense)
    for name, value in plan.weights.items():
        module, _, parameter = name.rpartition(".")
        holder = model.get_submodule(module)
        if getattr(holder, parameter) is None:
            holder.bias = nn.Parameter(holder.weight.new_zeros(len(holder.weight)))
        full = getattr(holder, parameter).zero_()
        index = [np.arange(size) for size in full.shape]
        for axis, entries in _kept_entries(dense, plan.keep, name).items():
            index[axis] = entries
        full[np.ix_(*index)] = value.to(full.dtype)
    for name, eps in plan.eps.items():
        model.get_submodule(name).eps = eps
    # Weights that a plan has are done; norms over cut channels still have to know.
    return masked(model, plan.keep)


def _kept_entries(model, keep, name):
    """Axis to what stays of a parameter there."""
    *path, leaf, parameter = name.split(".")
    stage = int(path[1]) if path[:1] == ["layers"] else 0 if path[:1] == ["patch_embed"] else len(model.layers) - 1
    own = [_width(model, keep, stage)]
    if leaf in ("fc1", "fc2") or path[-1:] == ["attn"]:
        block = model.get_submodule(".".join(path[:4]))
        inner = _inner(block, {k.rpartition(".")[2]: v for k, v in keep.items() if ".".join(path[:4]) + "." in k}, leaf)
        axes = [inner, *own] if leaf in ("qkv", "fc1") else [*own, inner]
    elif path[-1:] == ["downsample"]:
        before, size = _width(model, keep, stage - 1), model.layers[stage - 1].blocks[0].dim
        merged = np.concatenate([size * place + before for place in range(4)])
        axes = [merged] if leaf == "norm" else [*own, merged]
    else:  # the patch embedding, norms, the classifier
        axes = [None, *own] if leaf == "fc" else own
    axes = axes[:1] if parameter == "bias" else axes
    return {axis: entries for axis, entries in enumerate(axes) if entries is not None}


def _width(model, keep, stage):
    name = f"layers.{stage}.width"
    return np.asarray(keep[name])[0] if name in keep else np.arange(model.layers[stage].blocks[0].dim)


def _inner(block, keep, leaf):
    """The kept rows of qkv or fc1, or columns of proj or fc2."""
    if leaf in ("fc1", "fc2"):
        return np.asarray(keep["ffn"])[0] if "ffn" in keep else np.arange(block.mlp.fc2.in_features)
    heads, dim = block.attn.num_heads, block.attn.qkv.out_features // 3 // block.attn.num_heads
    staying = np.asarray(keep["heads"])[0] if "heads" in keep else np.arange(heads)
    qk, v = (
        (np.arange(heads)[:, None] * dim + np.asarray(keep.get(kind, np.tile(np.arange(dim), (heads, 1)))))[staying]
        for kind in ("qk", "v")
    )
    if leaf == "proj":
        return v.flatten()
    return np.concatenate([part * heads * dim + units.flatten() for part, units in enumerate((qk, qk, v))])


def digits_architecture():
    """An untrained Swin for 32 x 32 images: two stages of two blocks, the second of the first stage shifted."""
    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        embed_dim=24,
        depths=(2, 2),
        num_heads=(3, 2),
        head_dim=(9, 15),
        window_size=4,
        mlp_ratio=3.0,
        num_classes=10,
    )


def train_on_digits(model, epochs=8):
    """Train in place, by torch's plain loop."""
    images, targets = next(iter(loader("digits", model, split="train", batch_size=1024)))
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():  # timm's 0.02 is for widths of hundreds
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5, generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.05)
    starts = range(0, len(images), 32)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=epochs * len(starts), pct_start=0.2)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for start in starts:
            batch = order[start : start + 32]
            loss = functional.cross_entropy(model(images[batch]), targets[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    model.eval()
