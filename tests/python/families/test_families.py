"""Which models are taken, which are refused by name, and all of timm's variants."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import reference
import secateur as sc
import timm
import torch
import torch.nn.utils.prune
from models import KINDS, images, make
from pruning import plan_of
from small_vits import SMALL, small_vit
from timm.layers import Attention, HybridEmbed, LayerNorm, Mlp
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

MODULES = ("vision_transformer", "vision_transformer_hybrid", "deit")
VARIANTS = [name for module in MODULES for name in timm.list_models(module=module)]
REFUSED = {
    "vit_dlittle_patch16_reg1_gap_256": "blocks.0.attn: expected timm's Attention, got DiffAttention",
    "vit_dwee_patch16_reg1_gap_256": "blocks.0.attn: expected timm's Attention, got DiffAttention",
    "vit_dpwee_patch16_reg1_gap_256": "blocks.0: expected timm's Block, got DiffParallelScalingBlock",
    "vit_pwee_patch16_reg1_gap_256": "blocks.0: expected timm's Block, got ParallelScalingBlock",
    "vit_base_patch16_xp_224": "blocks.0: expected timm's Block, got ParallelScalingBlock",
    "vit_large_patch14_xp_224": "blocks.0: expected timm's Block, got ParallelScalingBlock",
    "vit_huge_patch14_xp_224": "blocks.0: expected timm's Block, got ParallelScalingBlock",
    "vit_small_patch16_18x2_224": "blocks.0: expected timm's Block, got ParallelThingsBlock",
    "vit_base_patch16_18x2_224": "blocks.0: expected timm's Block, got ParallelThingsBlock",
}


def small(name, whole):
    """The variant with as many heads, of 13 channels each, two blocks and a small image, weights left to the caller."""
    hybrid = type(whole.patch_embed) is HybridEmbed
    patch = (32, 32) if hybrid else whole.patch_embed.patch_size
    # MobileCLIP's stem has channels of its own.
    width = {} if name == "vit_base_mci_224" else {"embed_dim": 13 * whole.blocks[0].attn.num_heads}
    model = timm.create_model(name, device="meta", depth=2, img_size=(patch[0] * 2, patch[1] * 3), **width)
    return model.to_empty(device="cpu")


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_pruned_exactly_or_refused_by_name(name):
    if name in REFUSED:
        model = timm.create_model(name, device="meta", depth=2)
        state = model.state_dict()
        with pytest.raises(sc.Unsupported) as error:
            sc.inspect(model)
        assert str(error.value) == REFUSED[name]
        assert model.state_dict().keys() == state.keys()
        return
    whole = timm.create_model(name, device="meta", depth=2)
    own = sc.inspect(whole)
    assert own.params == sum(parameter.numel() for parameter in whole.parameters())
    assert {group.size for group in own.groups if group.kind == "width"} <= {whole.embed_dim}
    model = reference.randomise(small(name, whole)).double().eval()
    anatomy = sc.inspect(model)
    assert {group.kind for group in own.groups} == {group.kind for group in anatomy.groups}
    groups = {group.name: (group.heads, group.size) for group in anatomy.groups if group.kind != "tokens"}
    keep = reference.random_keep(np.random.default_rng(0), groups)
    x = images(model).double()
    with torch.inference_mode():
        masked = reference.masked(model, keep)
        expected = reference.outputs_to_compare(masked(x), masked, keep)
        del masked
        report = sc.prune(model, plan_of(model, keep))
        error = float((model(x) - expected).abs().max())
    assert error <= 1e-10 * max(1.0, float(expected.abs().max()))
    after = sc.inspect(model)
    assert (after.params, after.macs) == (report.params[1], report.macs[1])
    assert after.params == sum(parameter.numel() for parameter in model.parameters())


def test_the_list_of_variants_is_the_one_we_know():
    if tuple(map(int, timm.__version__.split(".")[:3])) == (1, 0, 31):
        assert len(VARIANTS) == 193
    assert set(VARIANTS) >= set(REFUSED)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vit_base_patch16_rpn_224", "ResPostBlock normalises what it adds"),
        ("vit_base_mci_224", "patch_embed.proj: Identity"),
    ],
)
def test_width_is_refused_where_it_cannot_be_cut(name, reason):
    model = timm.create_model(name, device="meta", depth=2)
    anatomy = sc.inspect(model)
    assert reason in anatomy.refused["width"]
    assert {group.kind for group in anatomy.groups} == {"qk", "v", "ffn", "heads", "layer", "tokens"}
    assert "width cannot be cut" in str(anatomy)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_are_described_completely(kind):
    """Every parameter axis that a cut of everything shrinks is in a group, and the sizes are the model's."""
    anatomy = sc.inspect(make(kind))
    sizes = {group.kind: (group.heads, group.size) for group in anatomy.groups if group.block in (0, None)}
    assert sizes["qk"] == sizes["v"] == (3, 13)
    assert sizes["width"] == (1, 39)
    assert anatomy.params == sum(anatomy.numel(name, {}) for name in anatomy.shapes)


class Subclass(VisionTransformer):
    pass


class LowRank(nn.Linear):
    pass


def _with(change):
    model = VisionTransformer(img_size=12, patch_size=3, embed_dim=39, depth=2, num_heads=3, num_classes=7)
    change(model)
    return model


def _adapter(model):
    model.blocks[1].mlp.fc2 = LowRank(156, 39)


def _parametrized(model):
    nn.utils.parametrizations.weight_norm(model.blocks[1].attn.qkv)


def _masked(model):
    torch.nn.utils.prune.l1_unstructured(model.blocks[1].attn.qkv, "weight", 0.5)


def _spectral(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.spectral_norm(model.blocks[0].mlp.fc1)


def _tied(model):
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight


def _other_norm(model):
    model.blocks[0].norm2 = nn.BatchNorm1d(39)


def _other_mlp(model):
    model.blocks[0].mlp = nn.Sequential(Mlp(39))


def _other_attention(model):
    class Mine(Attention):
        pass

    model.blocks[1].attn = Mine(39, 3)


def _other_block(model):
    class Mine(Block):
        pass

    model.blocks[0] = Mine(39, 3)


def _other_embedding(model):
    model.patch_embed = nn.Identity()
    model.patch_embed.num_patches, model.patch_embed.img_size = 16, (12, 12)


_COMPUTED = (
    "{}.weight: expected a parameter, got a tensor that a hook computes "
    "(torch.nn.utils.prune, weight_norm or spectral_norm; make it permanent first)"
)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_adapter, "blocks.1.mlp.fc2: expected nn.Linear, got LowRank"),
        (_parametrized, "blocks.1.attn.qkv: expected nn.Linear, got ParametrizedLinear"),
        (_masked, _COMPUTED.format("blocks.1.attn.qkv")),
        (_spectral, _COMPUTED.format("blocks.0.mlp.fc1")),
        (_tied, "blocks.1.mlp.fc1.weight: expected a parameter of its own, got one tied to blocks.0.mlp.fc1.weight"),
        (_other_norm, "blocks.0.norm2: expected LayerNorm or RmsNorm, got BatchNorm1d"),
        (_other_mlp, "blocks.0.mlp: expected Mlp, GluMlp or SwiGLU, got Sequential"),
        (_other_attention, "blocks.1.attn: expected timm's Attention, got Mine"),
        (_other_block, "blocks.0: expected timm's Block, got Mine"),
        (_other_embedding, "patch_embed: expected PatchEmbed or HybridEmbed, got Identity"),
    ],
)
def test_modules_that_compute_something_else_are_refused(change, text):
    with pytest.raises(sc.Unsupported) as error:
        sc.inspect(_with(change))
    assert str(error.value) == text


def test_wrappers_are_refused_with_what_to_pass():
    model = make("plain")
    wrappers = [
        (nn.DataParallel(model), "pass its .module"),
        (torch.compile(model), "compile after pruning"),
        (Subclass(img_size=12, patch_size=3, embed_dim=39, depth=1, num_heads=3), "by exact class"),
        (timm.create_model("vit_tiny_patch16_224", features_only=True), "pass its .model"),
        (timm.create_model("vgg11", device="meta"), "VGG"),
    ]
    for wrapper, hint in wrappers:
        with pytest.raises(sc.Unsupported, match="model: expected timm's .*VisionTransformer or ") as error:
            sc.inspect(wrapper)
        assert hint in str(error.value)
    with pytest.raises(sc.InvalidArgument, match="model: expected a timm model, got str"):
        sc.inspect("vit_tiny_patch16_224")


def test_a_refused_model_is_not_touched():
    model = _with(_other_mlp)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(sc.Unsupported):
        sc.calibrate(model, [torch.randn(2, 3, 12, 12)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_norm_layer_of_torch_is_taken():
    model = VisionTransformer(img_size=12, patch_size=3, embed_dim=39, depth=1, num_heads=3, norm_layer=nn.LayerNorm)
    assert type(model.norm) is nn.LayerNorm
    assert type(model.norm) is not LayerNorm
    assert sc.inspect(model).norms[0].centred


def test_parameters_that_hooks_compute_are_refused_by_name():
    for module, parameter, name in (
        ("", "pos_embed", "pos_embed"),
        ("blocks.1.ls2", "gamma", r"blocks\.1\.ls2\.gamma"),
    ):
        model = small_vit(init_values=0.1)
        torch.nn.utils.prune.random_unstructured(model.get_submodule(module), parameter, 0.3)
        with pytest.raises(sc.Unsupported, match=rf"^{name}: expected a parameter, got a tensor that a hook computes"):
            sc.inspect(model)


def test_a_model_of_no_size_is_refused_with_words():
    model = VisionTransformer(**SMALL | {"img_size": None, "pos_embed": "none", "no_embed_class": True})
    with pytest.raises(sc.Unsupported, match="patch_embed: expected a size of images"):
        sc.inspect(model)


def test_a_norm_that_is_never_run_is_refused():
    with pytest.raises(
        sc.Unsupported, match="fc_norm: expected none in a VisionTransformerDistilled, which leaves it out"
    ):
        sc.inspect(VisionTransformerDistilled(**SMALL, fc_norm=True))
