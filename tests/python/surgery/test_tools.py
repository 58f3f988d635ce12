"""Other tools take a pruned model as they take the dense one: tracers, feature extractors, quantization, Grad-CAM."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import secateur as sc
import swin_models as swin
import torch
from models import images, make
from pruning import plan_of, random_keep, set_fused
from secateur.families.absent import Absent, is_absent
from timm.models._features import FeatureHookNet
from timm.models._features_fx import FeatureGraphNet, create_feature_extractor
from timm.utils.attention_extract import AttentionExtract
from torch import nn
from torch.ao.quantization import get_default_qconfig_mapping, quantize_dynamic
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torchvision.models import feature_extraction

# What tools say of their own age; torchvision of what differs in training.
pytestmark = pytest.mark.filterwarnings("ignore")

NONE = np.empty((1, 0), np.int64)
KINDS = ["plain", "post_norm", "distilled", "qk_norm", "qk_rms_norm", "gate", "inner_norms", "fc_norm", "map_pool"]


def channels(model, qk=0.4, v=0.7):
    """Heads of 13 with 5 and 9 channels, or the other way round, of which two stay; FFNs of odd sizes."""
    cut = random_keep(model, 1, ("qk",), qk) | random_keep(model, 1, ("v",), v)
    return cut | random_keep(model, 2, ("heads", "ffn"), 0.6)


def without(model, *layers):
    """Channels cut in the layers that stay."""
    gone = {layer: {"attn": ("qk", "v", "heads"), "mlp": ("ffn",)}[layer[-4:].strip(".")] for layer in layers}
    inside = {f"{layer.rpartition('.')[0]}.{kind}" for layer, kinds in gone.items() for kind in kinds}
    return {name: kept for name, kept in channels(model).items() if name not in inside} | dict.fromkeys(layers, NONE)


def merged(model, keep):
    """The same with 3 of 20, then 2 of 17 patches merged, where tokens can merge at all."""
    return keep | {name: np.arange(10 - 3 + n)[None] for n, name in enumerate(sc.inspect(model).tokens) if n < 2}


CUTS = {
    "wide values": channels,
    "wide queries": lambda model: channels(model, 0.7, 0.4),
    "no attention at the end": lambda model: without(model, "blocks.1.attn"),
    "no FFN at the end": lambda model: without(model, "blocks.1.mlp", "blocks.0.attn"),
    "an empty block": lambda model: without(model, "blocks.1.mlp", "blocks.1.attn"),
    "merged": lambda model: merged(model, channels(model)),
    "merged, no FFN at the end": lambda model: merged(model, without(model, "blocks.1.mlp")),
}


def pruned(kind, cut, layout="exact", fused=True, last_block=None):
    model = make(kind)
    keep = CUTS[cut](model)
    if kind.startswith("qk") and layout == "stock":
        keep = {name: kept for name, kept in keep.items() if not name.endswith((".qk", ".v"))}
    elif kind == "inner_norms" and layout == "stock":
        keep = {name: kept for name, kept in keep.items() if not name.endswith(".v")}
    sc.prune(model, plan_of(model, keep), layout=layout, last_block=last_block)
    set_fused(model, fused)
    return model


def every(kinds=("plain",), cuts=tuple(CUTS), layouts=("exact", "stock")):
    """All cuts of all kinds, each in one of the layouts and with fused attention or not, in turn."""
    cases = [(kind, cut) for kind in kinds for cut in cuts]
    found = [(*case, layouts[n % len(layouts)], n // 2 % 2 == 0) for n, case in enumerate(cases)]
    return pytest.mark.parametrize(("kind", "cut", "layout", "fused"), found)


def same(found, expected, bar=1e-5):
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= bar * max(1.0, float(expected.abs().max()))


def seen(model, name, x):
    """What a forward hook sees."""
    outputs = []
    with model.get_submodule(name).register_forward_hook(lambda _module, _inputs, output: outputs.append(output)):
        model(x)
    assert len(outputs) == 1, name
    return outputs[0]


@every(KINDS)
@torch.no_grad()
def test_torch_fx_traces_what_it_traces_of_the_dense_model(kind, cut, layout, fused):
    """With masks as symbols and as what they are; of a batch size, a type and arguments that tracing did not see."""
    model = pruned(kind, cut, layout, fused)
    x = images(model, 3)
    traced = torch.fx.symbolic_trace(model)
    same(traced(x), model(x))
    same(traced(x[:1]), model(x[:1]))
    plain = torch.fx.symbolic_trace(model, concrete_args={"attn_mask": None, "is_causal": False})
    same(plain(x), model(x))
    if kind != "map_pool":  # whose class tokens of what type it adds torch does not promote
        same(copy.deepcopy(traced).double()(x.double()), copy.deepcopy(model).double()(x.double()), 1e-12)
    if "merged" in cut and sc.inspect(model).merged:
        with pytest.raises(sc.InvalidArgument, match="^is_causal: expected none in a model that merges"):
            traced(x, is_causal=True)
        return
    tokens = model.forward_features(x).shape[1]
    mask = torch.rand(tokens, tokens, generator=torch.Generator().manual_seed(0)) > 0.3
    mask.fill_diagonal_(True)
    same(traced(x, mask), model(x, mask))
    same(traced(x, None, True), model(x, None, True))


@every(["plain", "post_norm", "gate"])
@torch.no_grad()
def test_features_of_graphs_are_what_hooks_see(kind, cut, layout, fused):
    """In the last block, all tokens; of a removed layer, that it adds nothing."""
    model = pruned(kind, cut, layout, fused)
    x = images(model, 2)
    blocks = [f"blocks.{index}" for index in range(2)]
    inside = [f"{block}.{child}" for block in blocks for child in ("norm1", "attn", "norm2", "mlp", "drop_path1")]
    for names in ([*blocks, "norm"], inside):
        found = feature_extraction.create_feature_extractor(model, names)(x)
        for name in names:
            same(found[name], seen(model, name, x))
            if is_absent(model.get_submodule(name)):
                assert not found[name].any()
    same(create_feature_extractor(model, {"blocks.1": "f"})(x)["f"], seen(model, "blocks.1", x))
    for net in (FeatureGraphNet, FeatureHookNet):
        features = net(copy.deepcopy(model), (0, 1), output_fmt="NLC")(x)
        for block, feature in zip(blocks, features, strict=True):
            same(feature, seen(model, block, x))


@pytest.mark.parametrize("cut", ["wide values", "merged"])
@pytest.mark.parametrize("method", ["fx", "hook"])
@torch.no_grad()
def test_attention_maps_of_all_blocks(cut, method):
    model = pruned("plain", cut, fused=False)
    found = AttentionExtract(copy.deepcopy(model), method=method)(images(model, 2))
    assert len(found) == 2
    for maps, tokens in zip(found.values(), (21, 18 if cut == "merged" else 21), strict=True):
        assert maps.shape == (2, 2, tokens, tokens)
        same(maps.sum(-1), torch.ones(2, 2, tokens))
    names = ["blocks.0.attn.scaled_dot_product_attention", "blocks.1.attn.scaled_dot_product_attention"]
    set_fused(model, True)
    assert set(names) <= set(feature_extraction.get_graph_node_names(model)[1])


@every(["plain", "post_norm", "distilled"])
@torch.no_grad()
def test_blocks_are_traced_alone(kind, cut, layout, fused):
    model = pruned(kind, cut, layout, fused)
    x = torch.randn(2, 11, 39, generator=torch.Generator().manual_seed(0))
    for block in model.blocks:
        same(torch.fx.symbolic_trace(block)(x), block(x))


def quantized(model, x):
    prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping("x86"), (x,))
    prepared(x)
    return convert_fx(prepared)


def error(found, expected):
    return float((found - expected).norm() / expected.norm())


@every(["plain", "qk_norm", "fc_norm"], ["wide values", "no FFN at the end", "merged"])
@torch.no_grad()
def test_fx_graph_quantization(kind, cut, layout, fused):
    """As well as of the dense model: its linear layers, all of them, in 8 bits."""
    model, dense = pruned(kind, cut, layout, fused), make(kind)
    set_fused(dense, fused)
    x = images(model, 8)
    found = quantized(model, x)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert all(type(found.get_submodule(name)) is torch.ao.nn.quantized.Linear for name in linear)
    assert 1e-5 < error(found(x), model(x)) < 2 * error(quantized(dense, x)(x), dense(x)) + 0.02


class Adapted(nn.Module):
    """A linear layer with something added, in the way of LoRA."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.added = nn.Linear(base.in_features, base.out_features)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x):
        return self.base(x) + self.added(x)


@pytest.mark.parametrize("cut", ["wide values", "merged"])
@torch.no_grad()
def test_what_replaces_a_linear_layer_is_called(cut):
    """Also in a last block for prefix tokens alone, which else takes rows of the weight."""
    model = pruned("plain", cut, last_block="pooled")
    whole = pruned("plain", cut, last_block="whole")
    x = images(model, 8)
    assert error(quantize_dynamic(model, {nn.Linear})(x), model(x)) < 0.1
    adapted = Adapted(model.blocks[1].attn.qkv)
    model.blocks[1].attn.qkv, whole.blocks[1].attn.qkv = adapted, adapted
    same(model(x), whole(x))
    parametrized = copy.deepcopy(whole.blocks[1].attn.qkv.base)
    nn.utils.parametrizations.weight_norm(parametrized)
    parametrized.parametrizations.weight.original0.mul_(2)
    model.blocks[1].attn.qkv, whole.blocks[1].attn.qkv = parametrized, parametrized
    same(model(x), whole(x))


@every(["plain", "post_norm"], list(CUTS)[2:])
@torch.no_grad()
def test_export_compile_and_trace_by_example(kind, cut, layout, fused):
    model = pruned(kind, cut, layout, fused)
    x = images(model, 3)
    batch = ({0: torch.export.Dim("batch")},)
    same(torch.export.export(model, (x,), dynamic_shapes=batch).module()(x[:2]), model(x[:2]))
    same(torch.jit.trace(model, x)(x), model(x))
    if kind == "plain":
        same(torch.export.export(model, (x,), strict=True).module()(x), model(x))
        same(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))
        torch.compiler.reset()
    if "merged" not in cut:
        same(torch.jit.script(model)(x), model(x))


@torch.no_grad()
def test_an_exported_last_block_computes_prefix_tokens_alone():
    """What is traced for its features is whole; what is traced to run is not."""
    model = pruned("plain", "wide values", last_block="pooled")
    x = images(model, 2)
    program = torch.export.export(model, (x,)).module()
    traced = torch.fx.symbolic_trace(model)
    counted = []
    for each in (model, program, traced):
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            each(x)
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] < counted[2]


def by_hand(model, x):
    """A loop over layers as people write it, with residual connections of its own."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    for block in model.blocks:
        x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x), attn_mask=None)))
        x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    return model.forward_head(model.norm(x))


@pytest.mark.parametrize("cut", [cut for cut in CUTS if "merged" not in cut])
@torch.no_grad()
def test_loops_over_layers(cut):
    model = pruned("plain", cut)
    x = images(model, 2)
    same(by_hand(model, x), model(x))
    keys = list(model.state_dict())
    for block in model.blocks:
        block.attn.fused_attn = False
        assert not any(
            key.startswith("blocks") for key in keys if is_absent(model.get_submodule(key.rpartition(".")[0]))
        )
        assert not list(Absent().parameters())
    same(by_hand(model, x), model(x))


GONE = [cut for cut in CUTS if "no " in cut or "empty" in cut]


@pytest.mark.parametrize("kind", ["plain", "post_norm", "registers_layer_scale", "swin"])
@pytest.mark.parametrize("cut", GONE)
def test_removed_layers_are_run_for_those_who_watch_alone(kind, cut, monkeypatch):
    if kind == "swin":
        model = swin_without("layers.1.blocks.1.attn", "layers.1.blocks.1.mlp")
        x, block = swin.images(model), "layers.1.blocks.1"
    else:
        model = pruned(kind, cut)
        x, block = images(model, 2), "blocks.1"
    ran = []
    forward = Absent.forward
    monkeypatch.setattr(Absent, "forward", lambda self, *args, **named: ran.append(1) or forward(self, *args, **named))
    with torch.no_grad():
        expected = model(x)
        assert not ran
        for child in ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "drop_path2"):
            if hasattr(model.get_submodule(block), child):
                output = seen(model, f"{block}.{child}", x)
                assert output.isfinite().all()
                assert is_absent(model.get_submodule(f"{block}.{child}")) <= (not output.any())
                same(model(x), expected)
        assert ran
        # What a hook returns instead counts, as it does in a layer that is there. (Norms would take a constant away.)
        for name, module in model.named_modules():
            if is_absent(module):
                with module.register_forward_hook(
                    lambda _module, _inputs, output: output + torch.linspace(0, 2, output.shape[-1]) ** 2
                ):
                    assert not torch.allclose(model(x), expected), name


def grad_cam(model, name, x):
    """Selvaraju et al., ICCV 2017, with hooks as pytorch-grad-cam sets them: (B, N), before the ReLU."""
    kept = {}

    def keep(_module, _inputs, output):
        kept["activations"] = output
        output.register_hook(lambda gradient: kept.setdefault("gradients", gradient))

    with model.get_submodule(name).register_forward_hook(keep):
        model(x).max(-1).values.sum().backward()
    activations, gradients = (kept[each].flatten(1, -2) for each in ("activations", "gradients"))
    return (gradients.mean(1, keepdim=True) * activations).sum(-1).detach()


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("kind", ["plain", "post_norm", "distilled"])
def test_grad_cam(kind, cut):
    model = pruned(kind, cut)
    for child in ("norm1", "norm2", "attn", "mlp", "drop_path1"):
        for block in range(2):
            maps = grad_cam(model, f"blocks.{block}.{child}", images(model, 2).requires_grad_())
            assert maps.isfinite().all()
            if child in ("norm1", "norm2") and (kind, block, child) != ("plain", 1, "norm2"):
                assert maps.any(), (block, child)


def swin_without(*layers):
    model = swin.make("fitting")
    gone = {layer.rpartition(".")[0] for layer in layers}
    keep = {
        name: kept
        for name, kept in random_keep(model, 1, ("qk", "v", "heads", "ffn"), 0.6).items()
        if name.rpartition(".")[0] not in gone
    }
    sc.prune(model, plan_of(model, keep | dict.fromkeys(layers, NONE)))
    return model


@pytest.mark.parametrize("fused", [True, False])
@torch.no_grad()
def test_swin(fused):
    model = swin_without("layers.1.blocks.1.attn", "layers.0.blocks.0.mlp")
    set_fused(model, fused)
    x = swin.images(model)
    same(torch.fx.symbolic_trace(model)(x), model(x))
    names = [
        f"layers.{stage}.blocks.{block}.{child}" for stage in (0, 1) for block in (0, 1) for child in ("attn", "mlp")
    ]
    found = feature_extraction.create_feature_extractor(model, names)(x)
    for name in names:
        same(found[name], seen(model, name, x))
    assert error(quantized(model, x)(x), model(x)) < 0.3
    same(torch.export.export(model, (x,), strict=True).module()(x), model(x))
    same(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))
    torch.compiler.reset()


@pytest.mark.parametrize("cut", CUTS)
@torch.no_grad()
def test_files_copies_and_counts(cut, tmp_path):
    """The same bits and the same structure in a file, whose fields and tensors know nothing of the modules."""
    model = pruned("plain", cut)
    arguments = {"img_size": [12, 15], "patch_size": 3, "embed_dim": 39, "depth": 2, "num_heads": 3, "mlp_ratio": 1.7}
    sc.save(model, tmp_path / "model.safetensors", factory=("VisionTransformer", arguments | {"num_classes": 7}))
    again = sc.load(tmp_path / "model.safetensors")
    x = images(model, 2)
    for other in (again, copy.deepcopy(model)):
        assert torch.equal(other(x), model(x))
        assert list(other.state_dict()) == list(model.state_dict())
        assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
    assert sc.inspect(again).to_dict() == sc.inspect(model).to_dict()
    absent = {name for name, module in model.named_modules() if is_absent(module)}
    assert (
        absent
        == set(sc.inspect(model).absent)
        == {name for name, kept in CUTS[cut](make("plain")).items() if not kept.size}
    )


def test_merged_models_train_with_hooks_and_checkpoints():
    """Hooks on a block see tokens, and on attention what it returns; neither changes a gradient."""
    model = pruned("plain", "merged").train()
    x = images(model, 2)
    gradients = []
    for watch, checkpointing in ((False, False), (True, False), (True, True)):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        shapes = []
        handles = [
            model.get_submodule(name).register_forward_hook(lambda *args, shapes=shapes: shapes.append(args[-1].shape))
            for name in ("blocks.0", "blocks.1", "blocks.1.attn")
            if watch
        ]
        model(x).square().sum().backward()
        for handle in handles:
            handle.remove()
        assert not watch or set(shapes) == {(2, 18, 39), (2, 16, 39)}
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for others in gradients[1:]:
        for found, expected in zip(others, gradients[0], strict=True):
            same(found, expected)
