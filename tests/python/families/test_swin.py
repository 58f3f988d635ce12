"""SwinTransformers, with windows and stages of their own width: cut, calibrated, planned, saved."""

from __future__ import annotations

import copy
import hashlib
import inspect

import numpy as np
import pytest
import reference
import secateur as sc
import swin_models as swin
import timm
import torch
from filelock import FileLock  # torch brings it
from launch import run_script
from pruning import plan_of, random_keep, set_fused
from safetensors.torch import load_file, save_file
from scores import mean_scores
from secateur.anatomy import Member
from secateur.data.loader import loader
from secateur.families import swin as family
from secateur.families.absent import is_absent
from secateur.families.registry import family_of
from secateur.families.swin import PrunedWindowAttention
from secateur.files.container import replacing
from timm.models.swin_transformer import WindowAttention, window_reverse
from torch.utils.flop_counter import FlopCounterMode

METHODS = ["snp", "refit", "project", "magnitude"]
FACTORY = ("SwinTransformer", swin.BASE)


def flops(model, x):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


@torch.no_grad()
def check(dense, keep, x, layout="exact"):
    """Prune a copy and hold it to 1e-10 of the masked dense model in float64, with both ways of attention."""
    double, x = copy.deepcopy(dense).double(), x.double()
    masked = swin.masked(double, keep)
    expected = swin.outputs_to_compare(masked(x), masked, keep)
    report = sc.prune(double, plan_of(double, keep), layout=layout)
    for fused in (True, False):
        set_fused(double, fused)
        assert float((double(x) - expected).abs().max()) <= 1e-10 * max(1.0, float(expected.abs().max()))
    anatomy = sc.inspect(double)
    assert sum(p.numel() for p in double.parameters()) == anatomy.params == report.params[1]
    assert flops(double, x[:1]) == 2 * anatomy.macs == 2 * report.macs[1]
    return double


@pytest.mark.parametrize("kind", ["padded", "fitting", "rms_norm"])
@pytest.mark.parametrize("cut", ["qk", "v", "ffn", "width", "heads"])
def test_every_cut(kind, cut):
    dense = swin.make(kind)
    check(dense, random_keep(dense, 3, (cut,), fraction=0.6), swin.images(dense))


@pytest.mark.parametrize("kind", swin.KINDS)
def test_every_kind(kind):
    dense = swin.make(kind)
    pruned = check(dense, random_keep(dense, 4, fraction=0.6), swin.images(dense))
    assert {type(block.attn) for stage in pruned.layers for block in stage.blocks} == {PrunedWindowAttention}


@pytest.mark.parametrize("seed", range(6))
def test_random_sizes(seed):
    dense = swin.make("padded", seed)
    cut = [("qk", "v", "ffn", "width", "heads"), ("qk", "width"), ("v", "heads")][seed % 3]
    check(dense, random_keep(dense, seed, cut), swin.images(dense, seed=seed))


@pytest.mark.parametrize(
    "gone",
    [
        ("layers.0.blocks.0.attn",),
        ("layers.1.blocks.1.attn", "layers.1.blocks.1.mlp"),
        ("layers.0.blocks.0.mlp", "layers.1.blocks.0.attn", "layers.1.blocks.1.mlp"),
    ],
)
def test_whole_layers(gone):
    """Alone, and with all else cut as well; a block that has nothing left passes its input on."""
    dense = swin.make("padded")
    absent = dict.fromkeys(gone, np.empty((1, 0), np.int64))
    check(dense, absent, swin.images(dense))
    inside = {other for name in gone for other in sc.inspect(dense).layers[name].groups.values()}
    others = {name: kept for name, kept in random_keep(dense, 4, fraction=0.6).items() if name not in inside}
    pruned = check(dense, absent | others, swin.images(dense))
    assert sc.inspect(pruned).absent == gone
    assert all(is_absent(pruned.get_submodule(name)) for name in gone)


def test_heads_own_their_columns_of_the_table():
    dense = swin.make("fitting")
    pruned = copy.deepcopy(dense)
    keep = {"layers.0.blocks.1.heads": np.array([[0, 2]]), "layers.1.blocks.0.heads": np.array([[3]])}
    sc.prune(pruned, plan_of(pruned, keep))
    for name, kept in keep.items():
        attn, before = (m.get_submodule(name.replace("heads", "attn")) for m in (pruned, dense))
        assert type(attn) is WindowAttention
        assert torch.equal(attn.relative_position_bias_table, before.relative_position_bias_table[:, kept[0]])
        assert torch.equal(attn.relative_position_index, before.relative_position_index)


def test_nothing_cut_changes_no_bit():
    model = swin.make("padded")
    with torch.no_grad():
        before = model(swin.images(model))
        for keep in ({}, random_keep(model, 0, fraction=1.0)):
            sc.prune(model, plan_of(model, keep))
            assert torch.equal(model(swin.images(model)), before)


def test_pruning_twice_is_pruning_once():
    """The second round's indices are into the first's survivors; the dense softmax scale survives both."""
    dense = swin.make("padded").double()
    once, twice = copy.deepcopy(dense), copy.deepcopy(dense)
    first = random_keep(dense, 1, fraction=0.8)
    sc.prune(twice, plan_of(twice, first))
    second = random_keep(twice, 2, fraction=0.6)
    sc.prune(twice, plan_of(twice, second))
    joined = {}
    for name, kept in first.items():
        # The second round's heads are the first's survivors; of the others any channels will do.
        staying = first[name.rpartition(".")[0] + ".heads"][0] if name.endswith((".qk", ".v")) else slice(None)
        joined[name] = kept[:, : second[name].shape[1]].copy()
        joined[name][staying] = np.take_along_axis(kept[staying], second[name], axis=1)
    sc.prune(once, plan_of(once, joined))
    x = swin.images(dense).double()
    with torch.no_grad():
        assert torch.equal(once(x), twice(x))
    check(dense, joined, x)
    assert [block.attn.scale for block in twice.layers[1].blocks] == [7**-0.5] * 2


@pytest.mark.parametrize("kinds", [("qk",), ("v", "heads"), ("qk", "v", "ffn", "width", "heads")])
def test_stock_layout(kinds):
    """timm's own class takes zero-padded heads, by its own softmax scale, fused or not."""
    dense = swin.make("padded").double()
    keep = random_keep(dense, 6, kinds, fraction=0.5)
    x = swin.images(dense).double()
    expected = swin.masked(dense, keep)(x)
    sc.prune(dense, plan_of(dense, keep), layout="stock")
    for fused in (True, False):
        set_fused(dense, fused)
        with torch.no_grad():
            assert float((dense(x) - expected).abs().max()) <= 1e-10
    assert {type(block.attn) for stage in dense.layers for block in stage.blocks} == {WindowAttention}


def _wrong_scale(monkeypatch):
    fit = family._fit_attention

    def rescaled(attn, anatomy, layer, sizes):
        fit(attn, anatomy, layer, sizes)
        attn.scale = sizes[layer.groups["qk"]] ** -0.5

    monkeypatch.setattr(family, "_fit_attention", rescaled)


def _unmasked(monkeypatch):
    attend = PrunedWindowAttention.forward
    monkeypatch.setattr(PrunedWindowAttention, "forward", lambda self, x, mask=None: attend(self, x))


def _unbiased(monkeypatch):
    monkeypatch.setattr(
        PrunedWindowAttention, "_get_rel_pos_bias", lambda self: 0 * WindowAttention._get_rel_pos_bias(self)
    )


def _neighbours_interleaved(monkeypatch):
    entries = family.unit_entries

    def interleaved(size, heads=1, *, start=0, copies=1, stride=0):
        if copies == 1:
            return entries(size, heads, start=start)
        return np.arange(size * copies, dtype=np.int64).reshape(1, size, copies)

    monkeypatch.setattr(family, "unit_entries", interleaved)


def _other_table(monkeypatch):
    def shifted(*args):
        member = Member(*args)
        return Member(*args[:2], np.roll(args[2], 1, axis=1), *args[3:]) if member.part == "bias_table" else member

    monkeypatch.setattr(family, "Member", shifted)


@pytest.mark.parametrize("sabotage", [_wrong_scale, _unmasked, _unbiased, _neighbours_interleaved, _other_table])
def test_a_broken_build_is_caught(sabotage, monkeypatch):
    dense = swin.make("fitting")
    keep = random_keep(dense, 5, fraction=0.6)
    check(dense, keep, swin.images(dense))
    sabotage(monkeypatch)
    with pytest.raises((AssertionError, sc.Error)):
        check(dense, keep, swin.images(dense))


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swin_s3_tiny_224", "swin_base_patch4_window12_384"])
def test_macs_are_those_that_torch_counts(name):
    model = timm.create_model(name, device="meta").eval()
    anatomy = sc.inspect(model)
    assert flops(model, torch.empty(1, *anatomy.input_size, device="meta")) == 2 * anatomy.macs
    assert sum(parameter.numel() for parameter in model.parameters()) == anatomy.params


def test_the_published_model(tmp_path):
    """Swin-T at its own size, 4.5 GMACs: cut to half of everything, saved, loaded."""
    dense = reference.randomise(timm.create_model("swin_tiny_patch4_window7_224", num_classes=10)).eval()
    assert round(sc.inspect(dense).macs / 1e9, 1) == 4.5
    x = swin.images(dense, 1)
    pruned = check(dense, random_keep(dense, 0, fraction=0.5), x).float()
    sc.save(pruned, tmp_path / "half.safetensors")
    with torch.no_grad():
        assert torch.equal(sc.load(tmp_path / "half.safetensors")(x), pruned(x))


def test_exported_and_timed():
    """torch.export with any number of images; bench."""
    dense = swin.make("padded")
    model = copy.deepcopy(dense)
    sc.prune(model, plan_of(model, random_keep(model, 1, fraction=0.6)))
    for fused in (False, True):
        set_fused(model, fused)
        batch = {0: torch.export.Dim("batch", min=1)}
        exported = torch.export.export(model, (swin.images(model, 2),), dynamic_shapes=(batch,)).module()
        x = swin.images(model, 5)
        with torch.no_grad():
            torch.testing.assert_close(exported(x), model(x))
    assert sc.bench(model, dense, batch_size=1, repeats=3).speedup is not None


def test_streams_say_why_they_cannot_be_rotated():
    reasons = {kind: sc.inspect(swin.make(kind)).streams for kind in ("fitting", "padded", "any_size", "max_pool")}
    assert str(reasons["fitting"]["layers.0.width"]).startswith("layers.1.downsample.norm: ")
    last = reasons["fitting"]["layers.1.width"]
    assert last.centred
    assert list(last.writers) == [
        "layers.1.downsample.reduction",
        *(f"layers.1.blocks.{block}.{writer}" for block in range(2) for writer in ("attn.proj", "mlp.fc2")),
    ]
    assert last.readers["norm"] == ("head.fc",)
    assert str(reasons["padded"]["layers.1.width"]).startswith("layers.1.blocks.0: ")
    assert "maxima" in str(reasons["max_pool"]["layers.1.width"]) or "padded" in str(
        reasons["max_pool"]["layers.1.width"]
    )
    assert str(sc.inspect(swin.make("one_stage")).streams["layers.0.width"]).startswith("patch_embed.norm: ")


@pytest.mark.parametrize("index", range(4))
def test_the_rest_of_the_model_from_a_block_on(index):
    model = swin.make("fitting")
    blocks, seen = family_of(model).blocks(model), []
    hook = blocks[index].register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        expected = model(swin.images(model))
        hook.remove()
        assert torch.equal(family_of(model).from_block(model, index, seen[0]), expected)


@pytest.mark.filterwarnings("ignore")  # torch.jit is old, timm interpolates tables by deprecated ways
def test_it_stays_a_timm_model():
    """Other input sizes, another classifier, gradient checkpointing and torch.jit.script work as before."""
    dense = swin.make("fitting")
    gone = {"layers.1.blocks.0.attn": ("qk", "v", "heads"), "layers.1.blocks.1.mlp": ("ffn",)}
    inside = {f"{layer.rpartition('.')[0]}.{kind}" for layer, kinds in gone.items() for kind in kinds}
    keep = {name: kept for name, kept in random_keep(dense, 7, fraction=0.5).items() if name not in inside}
    keep |= dict.fromkeys(gone, np.empty((1, 0), np.int64))
    model = copy.deepcopy(dense)
    sc.prune(model, plan_of(model, keep))
    x = swin.images(model)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(torch.jit.script(model)(x), expected)
        features = model.forward_features(x)
        assert features.shape[-1] == model.num_features == keep["layers.1.width"].shape[1]
    assert [info["num_chs"] for info in model.feature_info] == [keep[f"layers.{i}.width"].shape[1] for i in range(2)]
    model.set_grad_checkpointing()
    model.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    for each in (model.eval(), dense):
        each.set_input_size((40, 56), window_size=(3, 4))
    y = torch.rand(2, 3, 40, 56)
    with torch.no_grad():
        torch.testing.assert_close(model(y), swin.masked(dense, keep)(y), rtol=1e-4, atol=1e-5)
    model.reset_classifier(3)
    assert model(y).shape == (2, 3)


def moments_of(x):
    x = x.reshape(-1, x.shape[-1])
    return x.mean(0).numpy(), (x.T @ x / len(x)).numpy()


def observed(model, x):
    """What attention and FFN layers and the norms of the streams see, by plain hooks: name to tensor."""
    seen, handles = {}, []

    def note(name, module, *, output=False):
        if output:
            handles.append(module.register_forward_hook(lambda _m, _args, out: seen.update({name: out})))
        else:
            handles.append(module.register_forward_pre_hook(lambda _m, args: seen.update({name: args[0]})))

    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if leaf == "qkv":
            note(name, module, output=True)
        elif leaf in ("norm1", "norm2", "norm", "proj", "fc2"):
            note(name, module)
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("kind", ["padded", "fitting", "rms_norm"])
def test_statistics_are_what_hooks_see(kind):
    """Scores window by window; moments over the images' tokens, of what the projection takes without those that pad."""
    model = swin.make(kind).double()
    x = swin.images(model, 5).double()
    stats = sc.calibrate(model, [x[:2], x[2:]], gamma=3)
    assert stats.images_by_fold == (3, 2)
    seen = observed(model, x)
    for name, layer in sc.inspect(model).layers.items():
        if layer.kind == "ffn":
            check_moments(stats, layer.groups["ffn"], seen[f"{name}.fc2"])
            continue
        attn, block = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
        q, k, v = seen[f"{name}.qkv"].unflatten(-1, (3, attn.num_heads, -1)).unbind(2)
        windows = len(q) // len(x)
        for fold, chosen in ((None, slice(None)), ("even", slice(0, None, 2)), ("odd", slice(1, None, 2))):
            mine = [each.unflatten(0, (len(x), windows))[chosen].flatten(0, 1) for each in (q, k)]
            expected = mean_scores(*mine, 3)
            np.testing.assert_allclose(stats.importance(layer.groups["qk"], fold), expected, rtol=1e-6, atol=1e-8)
            expected = gram_of_scores(*mine)
            found = stats.gram(layer.groups["qk"], "score_gram", fold)
            np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())
        check_moments(stats, layer.groups["v"], v.flatten(2))
        # Back to the feature map, as timm does it, to see which tokens pad.
        places = seen[f"{name}.proj"].unflatten(1, block.window_size)
        height, width = (s * -(-r // s) for s, r in zip(block.window_size, block.input_resolution, strict=True))
        places = window_reverse(places, block.window_size, height, width)
        check_moments(stats, f"{name}.proj", places[:, : block.input_resolution[0], : block.input_resolution[1]])
    for norm in sc.inspect(model).norms:
        y = seen[norm.name]
        y = y - y.mean(-1, keepdim=True) if norm.centred else y
        check_moments(stats, norm.name, y / y.norm(dim=-1, keepdim=True) * norm.size**0.5)


def gram_of_scores(q, k):
    """Sums over maps of QᵀQ ∘ K_cᵀK_c, (heads, d, d)."""
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    k = k - k.mean(2, keepdim=True)
    return ((q.mT @ q) * (k.mT @ k)).sum(0).numpy()


def check_moments(stats, group, rows):
    mean, second = moments_of(rows)
    moments = stats.moments(group)
    assert moments.rows == rows[..., 0].numel()
    np.testing.assert_allclose(moments.mean, mean, atol=1e-9)
    np.testing.assert_allclose(moments.second, second, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_statistics_do_not_depend_on_how_images_are_batched(fraction):
    model = swin.make("padded").double()
    x = swin.images(model, 7).double()
    whole = sc.calibrate(model, [x], token_fraction=fraction)
    split = sc.calibrate(model, x.split([1, 4, 2]), token_fraction=fraction)
    assert whole.tensors.keys() == split.tensors.keys()
    for name, array in whole.tensors.items():
        np.testing.assert_allclose(array, split.tensors[name], rtol=1e-6, atol=1e-6 * np.abs(array).max(), err_msg=name)


@pytest.fixture(scope="module")
def trained(pytestconfig):
    """A Swin trained on digits, its weights kept in pytest's cache under a digest of the code that makes them."""
    made_by = swin.digits_architecture, swin.train_on_digits
    source = "".join(map(inspect.getsource, made_by)) + timm.__version__
    name = f"swin-{hashlib.sha256(source.encode()).hexdigest()[:16]}.safetensors"
    path = pytestconfig.cache.mkdir("secateur") / name
    model = swin.digits_architecture()
    with FileLock(path.with_suffix(".lock")):  # one worker trains, the others wait
        if not path.is_file():
            torch.manual_seed(0)
            swin.train_on_digits(model)
            with replacing(path) as temporary:
                save_file(model.state_dict(), temporary)
    model.load_state_dict(load_file(path))
    assert accuracy(model.eval()) >= 0.9, "the model of the fixture is not trained"
    return model


@pytest.fixture(scope="module")
def calibrated(trained):
    """Its statistics over 96 training images."""
    return sc.calibrate(
        trained, loader("digits", trained, split="train", batch_size=32), max_images=96, sensitivity="noise"
    )


def accuracy(model):
    images, targets = next(iter(loader("digits", model, batch_size=1024)))
    with torch.inference_mode():
        return (model(images).argmax(dim=1) == targets).double().mean().item()


# The first stage's stream cannot be rotated, so "project" refuses to.
WIDTHS = {"project": "layers.1.width"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["fitting", "padded"])
def test_pruned_is_the_dense_model_with_the_plans_weights(method, kind):
    """In float64; all kinds at once, layers apart: what a cut does to what is left is what the plan says."""
    model = swin.make(kind).double()
    x = swin.images(model, 10).double()
    width = [] if kind == "padded" and method == "project" else [WIDTHS.get(method, "width")]
    stats = sc.calibrate(model, [x], sensitivity="noise")
    for groups in (("qk", "v", "ffn", "heads", *width), ("qk", "v", "ffn", "layer")):
        plan = sc.plan(model, stats, method=method, target=sc.Target(macs=0.6), groups=groups, round_to=1)
        assert 0.55 <= plan.macs[1] / plan.macs[0] <= 0.6
        expected = swin.substituted(model, plan)
        pruned = copy.deepcopy(model)
        sc.prune(pruned, plan)
        assert flops(pruned, x[:1]) == 2 * plan.macs[1]
        with torch.no_grad():
            wanted = expected(x)
            for fused in (True, False):
                set_fused(pruned, fused)
                assert float((pruned(x) - wanted).abs().max()) <= 1e-10 * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize(("method", "most"), [("snp", 0.1), ("refit", 0.02), ("project", 0.02)])
def test_accuracy_of_a_trained_model(method, most, trained, calibrated):
    groups = ("qk", "v", "ffn", "heads", WIDTHS.get(method, "width"))
    plan = sc.plan(trained, calibrated, method=method, target=sc.Target(macs=0.6), groups=groups, round_to=1)
    pruned = copy.deepcopy(trained)
    sc.prune(pruned, plan)
    assert accuracy(trained) - accuracy(pruned) <= most


def onto(size, rank, seed):
    """A projection onto random directions."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=torch.float64)).Q
    return basis @ basis.T


def of_low_rank(model):
    """Queries, keys and values of each head in 3 directions, the last stream in 30: none is a channel of its own."""
    with torch.no_grad():
        linears = []
        for seed, block in enumerate(family_of(model).blocks(model)):
            attn = block.attn
            size = attn.qkv.out_features // (3 * attn.num_heads)
            linears.append((attn.qkv, [onto(size, 3, 9 * seed + head) for head in range(3 * attn.num_heads)]))
        last = model.layers[-1]
        writers = [last.downsample.reduction, *(w for block in last.blocks for w in (block.attn.proj, block.mlp.fc2))]
        linears += [(writer, [onto(last.downsample.out_dim, 30, 99)]) for writer in writers]
        for linear, parts in linears:
            projection = torch.block_diag(*parts)
            linear.weight.copy_(projection @ linear.weight)
            if linear.bias is not None:
                linear.bias.copy_(projection @ linear.bias)
    return model


@pytest.mark.parametrize("kind", ["fitting", "padded"])
def test_directions_that_are_not_used_cost_nothing(kind):
    """Bias tables, masks and padded windows leave queries, keys and values free to be rotated; the last stream too."""
    model = of_low_rank(swin.make(kind).double())
    stats = sc.calibrate(model, [swin.images(model, 30).double()])
    ratios = [{"qk": 0.5}, {"v": 0.5}, *([{"layers.1.width": 0.4}] if kind == "fitting" else [])]
    x = swin.images(model, seed=5).double()
    for removed in ratios:
        pruned = copy.deepcopy(model)
        sc.prune(pruned, sc.plan(model, stats, method="project", ratios=removed))
        assert sc.inspect(pruned).macs < sc.inspect(model).macs
        with torch.no_grad():
            torch.testing.assert_close(pruned(x), model(x), rtol=1e-8, atol=1e-8)


LOADED = """
import sys, torch, secateur as sc
torch.set_num_threads(1)
for name in sys.argv[1:]:
    x, expected = torch.load(name + ".pt", weights_only=True)
    model = sc.load(name + ".safetensors")
    with torch.no_grad():
        assert torch.equal(model(x), expected), name
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = not module.fused_attn
        torch.testing.assert_close(model(x), expected, rtol=0.1, atol=0.1)
"""


def test_save_and_load(tmp_path, trained, calibrated):
    """In another process, bit for bit: unequal sizes, lone columns of tables, absent layers, biases that plans add."""
    groups = ("qk", "v", "ffn", "heads", "layers.1.width")
    plan = sc.plan(trained, calibrated, target=sc.Target(macs=0.6), groups=groups, round_to=1)
    planned, stock, cut = copy.deepcopy(trained), copy.deepcopy(trained), swin.make("padded")
    sc.prune(planned, plan)
    sc.prune(stock, plan_of(stock, random_keep(stock, 9, ("qk", "v", "heads"), fraction=0.6)), layout="stock")
    keep = {n: kept for n, kept in random_keep(cut, 8, fraction=0.6).items() if not n.startswith("layers.1.blocks.0.")}
    keep |= dict.fromkeys(("layers.1.blocks.0.attn", "layers.1.blocks.0.mlp"), np.empty((1, 0), np.int64))
    sc.prune(cut, plan_of(cut, keep))
    half = copy.deepcopy(planned).to(torch.bfloat16)
    models = {"planned": planned, "stock": stock, "cut": cut, "half": half}
    for name, model in models.items():
        sc.save(model, tmp_path / f"{name}.safetensors", factory=None if name != "cut" else FACTORY)
        x = swin.images(model, 3).to(next(model.parameters()).dtype)
        torch.set_num_threads(1)
        with torch.no_grad():
            torch.save((x, model(x)), tmp_path / f"{name}.pt")
    files = [str(tmp_path / name) for name in models]
    code, _, errors = run_script(LOADED, *files, fresh=True)
    assert code == 0, errors


def test_other_models_are_refused():
    assert sc.inspect(timm.create_model("swinv2_tiny_window8_256", device="meta")).family == "traced"
    model = swin.make("padded")
    model.layers[0].blocks[0].mlp.fc1 = torch.nn.utils.parametrizations.weight_norm(model.layers[0].blocks[0].mlp.fc1)
    with pytest.raises(sc.Unsupported, match=r"layers\.0\.blocks\.0\.mlp\.fc1"):
        sc.inspect(model)
    model.layers[1].downsample.norm = torch.nn.LayerNorm(108, elementwise_affine=False)
    with pytest.raises(sc.Unsupported, match=r"layers\.1\.downsample\.norm: expected a norm with a scale"):
        sc.inspect(model)
    model = swin.make("padded")
    model.layers[1].blocks[0].norm1 = torch.nn.Identity()
    with pytest.raises(sc.Unsupported, match=r"layers\.1\.blocks\.0\.norm1"):
        sc.inspect(model)
