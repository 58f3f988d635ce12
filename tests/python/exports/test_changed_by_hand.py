"""Models that users changed by hand: saved, loaded in a fresh process to the same bits and settings, or a way out."""

from __future__ import annotations

import copy
import json
from functools import partial

import models
import pytest
import secateur as sc
import swin_models
import timm
import torch
from changed_by_hand import CHANGES, MODELS, described, drawn
from launch import run_script
from reference import randomise
from secateur.files import container
from timm.layers import GluMlp, LayerNorm, RmsNorm
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import nn

COUNT = 220
LOADING = """
import json, sys
from pathlib import Path
import torch
import secateur as sc
from changed_by_hand import described

torch.set_num_threads(int(sys.argv[2]))
folder = Path(sys.argv[1])
found = {file.stem: described(sc.load(file)) for file in sorted(folder.glob("*.safetensors"))}
(folder / "found.json").write_text(json.dumps(found))
"""


def foreign(model):
    """Names of modules that no file can hold, with what stands there."""
    return {name: module for name, module in model.named_modules() if type(module).__module__ == "changed_by_hand"}


def heads_of(model):
    """Names of what classifies: Swin's is within a module that pools."""
    names = [name for name in ("fc", "head", "head_dist") if name in dict(model.named_modules())]
    return ["head.fc"] if hasattr(getattr(model, "head", None), "fc") else names


def put(model, name, module):
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def saved(model, path):
    """Why the model was not saved, or None."""
    try:
        sc.save(model, path)
    except sc.Error as error:
        return str(error)
    return None


def taken_out(model, error, folder):
    """Follow the way out that a refusal names; return the model as it comes back in this process."""
    path = folder / "out.safetensors"
    if "head='omit'" in error:
        sc.save(model, path, head="omit")
        loaded = sc.load(path)
        for name in heads_of(model):
            assert type(loaded.get_submodule(name)) is nn.Identity
            put(loaded, name, model.get_submodule(name))
        return loaded
    assert "put back what it builds before saving" in error
    name = error.split(" at ")[1].split(" where")[0]
    bare = copy.deepcopy(model)
    put(bare, name, nn.GELU())
    sc.save(bare, path)
    loaded = sc.load(path)
    put(loaded, name, model.get_submodule(name))
    return loaded


def test_every_change_comes_back_or_has_a_way_out(tmp_path):
    """Generated models: families, heads, norms, channels, depth, pooling, rates, switches, layouts and types."""
    expected, words, refused = {}, {}, 0
    for seed in range(COUNT):
        what, model = drawn(seed)
        words[str(seed)] = what
        error = saved(model, tmp_path / f"{seed}.safetensors")
        if error is None:
            expected[str(seed)] = described(model)
            continue
        refused += 1
        assert foreign(model) or type(model.get_submodule(heads_of(model)[0])) is nn.Sequential, f"{what}: {error}"
        back = taken_out(model, error, tmp_path)
        assert described(back)["output"] == described(model)["output"], what
        (tmp_path / "out.safetensors").unlink()
    code, _, errors = run_script(LOADING, tmp_path, torch.get_num_threads())
    assert code == 0, errors
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.keys() == expected.keys()
    for seed, wanted in json.loads(json.dumps(expected)).items():
        differing = [part for part, value in wanted.items() if value != found[seed][part]]
        assert not differing, f"{words[seed]}: {differing} differ"
    # Nearly all come back by themselves, and some cannot.
    assert 10 < refused < COUNT / 4
    told = " ".join(words.values())
    assert all(name in told for name in (*CHANGES, *MODELS, "dense", "exact", "stock", "float64", "bfloat16"))


# Neither compared nor written: what timm knows of a model's origin, and what follows from its modules.
NOT_OF_A_FILE = {
    *("default_cfg", "pretrained_cfg", "pretrained_model_args", "feature_info"),
    *(
        "_model_args",
        "_traits",
        "_fast_norm",
        "_reversed_padding_repeated_twice",
        "_ref_grid_size",
        "_ref_window_sizes",
    ),
    # Follow from modules.
    *("training", "num_classes", "in_chans"),
}


def test_no_attribute_of_any_module_goes_unseen():
    """Each is a parameter, a buffer or a module, or plain and so compared or written; or it is named above.

    A new version of timm or torch that brings another one fails here.
    """
    plain = (bool, int, float, str, tuple, type(None))
    own = vars(nn.Module()).keys()
    unseen, seen = set(), set()
    built = [make() for make in MODELS.values()] + [drawn(seed)[1] for seed in range(40)]
    built += [models.make(kind) for kind in (*models.KINDS, "post_norm")]
    built += [swin_models.make(kind) for kind in swin_models.KINDS]
    for model in built:
        for module in model.modules():
            for name, value in vars(module).items():
                if name in NOT_OF_A_FILE:
                    seen.add(name)
                elif name not in own and (name.startswith("_") or not isinstance(value, plain)):
                    unseen.add(f"{type(module).__name__}.{name}")
    assert not unseen
    assert seen == NOT_OF_A_FILE


@pytest.mark.parametrize("made", ["VisionTransformer", "resnet10t"])
def test_buffers_come_back(made, tmp_path):
    """Those of the state, and those that are computed when a model is built."""
    model = models.make("plain") if made == "VisionTransformer" else timm.create_model(made, num_classes=3).eval()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                setattr(module, name, torch.rand_like(buffer) + 0.5)
    factory = ("VisionTransformer", models.BASE) if made == "VisionTransformer" else None
    sc.save(model, tmp_path / "m.safetensors", factory=factory)
    loaded = dict(sc.load(tmp_path / "m.safetensors").named_buffers())
    assert loaded.keys() == dict(model.named_buffers()).keys()
    assert all(torch.equal(buffer, loaded[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_a_model_without_its_head(kind, tmp_path):
    """Saved with head="omit", loaded with an Identity, and the head put back: the same bits; the model is unchanged."""
    model = MODELS[kind]().eval()
    before = described(model)
    sc.save(model, tmp_path / "m.safetensors", head="omit")
    assert described(model) == before
    loaded = sc.load(tmp_path / "m.safetensors")
    assert loaded.num_classes == 0
    for name in heads_of(model):
        assert type(loaded.get_submodule(name)) is nn.Identity
        put(loaded, name, model.get_submodule(name))
    assert described(loaded)["output"] == before["output"]


def test_classes_come_back_with_the_head(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    model.head = nn.Linear(model.embed_dim, 5, bias=False)
    model.patch_embed.proj = nn.Conv2d(1, model.embed_dim, 16, 16)
    assert sc.inspect(model).input_size == (1, 32, 32)
    sc.save(model, tmp_path / "m.safetensors")
    loaded = sc.load(tmp_path / "m.safetensors")
    assert (loaded.num_classes, loaded.in_chans, loaded.head.bias) == (5, 1, None)
    # The fingerprint is the model's, so that plans fit both.
    stats = sc.calibrate(model, [torch.rand(4, 1, 32, 32) * 2 - 1])
    plan = sc.plan(model, stats, method="snp", ratios={"qk": 0.5})
    assert sc.prune(loaded, plan).params == plan.params


@pytest.mark.parametrize(
    "arguments",
    [
        {"norm_layer": nn.LayerNorm},
        {"norm_layer": partial(nn.LayerNorm, eps=3e-6), "act_layer": partial(nn.GELU, approximate="tanh")},
        {"norm_layer": RmsNorm, "act_layer": nn.SiLU, "block_fn": ResPostBlock},
        {
            "mlp_layer": partial(GluMlp, act_layer=nn.SiLU, gate_last=False),
            "embed_norm_layer": partial(LayerNorm, eps=1.0),
        },
    ],
)
@pytest.mark.parametrize("by_hand", [False, True])
def test_arguments_that_are_classes(arguments, by_hand, tmp_path):
    """Written by their public names, with what a partial holds."""
    name = "VisionTransformer" if by_hand else "vit_tiny_patch16_224"
    more = {**models.BASE, **arguments}
    model = VisionTransformer(**more) if by_hand else timm.create_model(name, **more)
    sc.save(randomise(model, 1).eval(), tmp_path / "m.safetensors", factory=(name, more) if by_hand else None)
    loaded = sc.load(tmp_path / "m.safetensors")
    assert described(loaded) == described(model)
    sc.save(loaded, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "m.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (nn.GroupNorm, "got norm_layer = <class 'torch.nn.modules.normalization.GroupNorm'>"),
        (partial(nn.LayerNorm, 39), r"got norm_layer = functools\.partial"),
        (lambda width, **_: nn.LayerNorm(width), "got norm_layer = <function"),
    ],
)
def test_arguments_that_no_file_can_name(value, text, tmp_path):
    model = VisionTransformer(**models.BASE)
    with pytest.raises(sc.InvalidArgument, match="factory: expected .* JSON values or classes of norms.*" + text):
        sc.save(model, tmp_path / "m.safetensors", factory=("VisionTransformer", {**models.BASE, "norm_layer": value}))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"modules": {"head": {"class": "os.system", "arguments": {}}}}, "class: expected one of torch or timm"),
        (
            {"modules": {"nowhere": {"class": "torch.nn.ReLU"}}},
            "changes: expected modules of this model, got 'nowhere'",
        ),
        (
            {"modules": {"norm": {"class": "timm.layers.Attention"}}},
            "changes: expected a norm, an activation or a dropout",
        ),
        ({"modules": {"norm": {"class": "torch.nn.LayerNorm", "arguments": {"eps": []}}}}, "expected plain arguments"),
        ({"modules": {"norm": None}}, "changes: expected modules of this model"),
        ({"unbiased": ["blocks"]}, "changes: expected linear layers without bias, got 'blocks'"),
        ({"settings": {"": {"forward": 1}}}, r"changes: expected settings of this model, got \.forward = 1"),
        ({"settings": {"norm": {"eps": [1]}}}, r"changes: expected settings of this model, got norm\.eps"),
        ({"settings": {"gone": {"eps": 1}}}, "changes: expected settings of this model, got gone"),
        ({"settings": 3}, "got one whose fields cannot be understood|arguments: expected those of"),
    ],
)
def test_files_with_changes_that_secateur_does_not_write(change, text, tmp_path):
    path = tmp_path / "m.safetensors"
    sc.save(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1), path)
    header, tensors = container.read(path, "model")
    header["changes"] |= change
    container.write(path, "model", header, tensors)
    with pytest.raises(sc.InvalidArgument, match=text):
        sc.load(path)
