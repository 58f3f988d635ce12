"""One file that rebuilds the model bit for bit in a fresh process, or one clear error."""

from __future__ import annotations

import hashlib
import json
import struct
import sys
import warnings

import pytest
import secateur as sc
import timm
import torch
from launch import run_script
from models import BASE, KINDS, images, make
from pruning import plan_of, random_keep
from safetensors import safe_open
from safetensors.torch import save_file
from secateur.files import container
from small_vits import SMALL, small_batches, small_vit
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn


@pytest.fixture
def pruned(digits_model):
    sc.prune(digits_model, plan_of(digits_model, random_keep(digits_model, 1, fraction=0.6)))
    return digits_model


def test_the_same_bits_in_a_fresh_process(pruned, digits_images, tmp_path):
    path = tmp_path / "pruned.safetensors"
    sc.save(pruned, path)
    save_file({"x": digits_images}, tmp_path / "images.safetensors")
    script = (
        "import sys, hashlib, torch, secateur\n"
        "from safetensors.torch import load_file\n"
        "torch.set_num_threads(1)\n"
        "x = load_file(sys.argv[2])['x']\n"
        "with torch.no_grad():\n"
        "    y = secateur.load(sys.argv[1])(x)\n"
        "print(hashlib.sha256(y.numpy().tobytes()).hexdigest())\n"
    )
    code, out, errors = run_script(script, path, tmp_path / "images.safetensors", fresh=True)
    assert code == 0, errors
    with torch.no_grad():
        expected = hashlib.sha256(pruned(digits_images).numpy().tobytes()).hexdigest()
    assert out.strip() == expected


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
@pytest.mark.parametrize("more", [{}, {"weight_init": "jax"}])
def test_a_loaded_model_is_initialised_as_timm_would(name, more, tmp_path):
    """If somebody asks it to: it does not show that it was built without initial values."""
    if "distilled" in name and more:
        pytest.skip("timm's distilled models take no other initial values")
    model = timm.create_model(name, img_size=32, depth=1, num_classes=3, **more)
    sc.save(model, tmp_path / "model.safetensors")
    loaded = sc.load(tmp_path / "model.safetensors")
    assert loaded.weight_init_mode == model.weight_init_mode
    assert loaded._model_args.get("weight_init") == model._model_args.get("weight_init")
    torch.manual_seed(3)
    model.init_weights()
    torch.manual_seed(3)
    loaded.init_weights()
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_factory_is_an_option_of_the_export(tmp_path):
    model = small_vit()
    sc.export(model, tmp_path / "model", format="native", factory=("VisionTransformer", {**SMALL, "mlp_ratio": 2.2}))
    assert torch.equal(sc.load(tmp_path / "model").head.weight, model.head.weight)


def rebuilt(model, tmp_path, **arguments):
    sc.save(model, tmp_path / "model.safetensors", **arguments)
    loaded = sc.load(tmp_path / "model.safetensors")
    x = images(model).to(next(model.parameters()).dtype)
    with torch.no_grad():
        assert torch.equal(model(x), loaded(x))
    assert [type(m) for m in model.modules()] == [type(m) for m in loaded.modules()]
    assert not loaded.training
    return loaded


VARIANTS = [
    ("deit_tiny_distilled_patch16_224", {"img_size": 32}),
    ("deit3_small_patch16_224", {"img_size": 32}),
    ("vit_small_patch14_reg4_dinov2", {"img_size": 42}),
    ("vit_base_patch16_siglip_224", {"img_size": 32}),
    ("vit_base_patch32_clip_224", {"img_size": 64}),
    ("aimv2_large_patch14_224", {"img_size": 28}),
    ("vit_tiny_r_s16_p8_224", {"img_size": 64}),
    ("beit3_base_patch16_224", {"img_size": 32}),
    ("vit_base_mci_224", {"img_size": 64}),
    ("vit_small_patch16_224", {"img_size": 32, "qk_norm": True, "num_classes": 5, "drop_path_rate": 0.1}),
]


@pytest.mark.parametrize(("name", "arguments"), VARIANTS)
@pytest.mark.parametrize("cut", [True, False])
def test_timm_models(name, arguments, cut, tmp_path):
    model = timm.create_model(name, depth=2, **arguments).eval()
    if cut:
        sc.prune(model, plan_of(model, random_keep(model, 1, fraction=0.4)))
    loaded = rebuilt(model, tmp_path)
    assert loaded.pretrained_cfg["architecture"] == name
    assert loaded.pretrained_cfg["mean"] == model.pretrained_cfg["mean"]
    assert not {"url", "hf_hub_id", "file"} & loaded.pretrained_cfg.keys()
    assert sc.inspect(loaded).to_dict() == sc.inspect(model).to_dict()
    rebuilt(loaded, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(pruned, tmp_path, dtype):
    assert next(rebuilt(pruned.to(dtype), tmp_path).parameters()).dtype is dtype


def test_after_changes_that_timm_offers(pruned, tmp_path):
    pruned.reset_classifier(3, "avg")
    pruned.set_input_size((24, 40))
    loaded = rebuilt(pruned, tmp_path)
    assert loaded.global_pool == "avg"
    assert loaded.patch_embed.img_size == (24, 40)
    loaded.reset_classifier(11)
    assert loaded(torch.randn(1, 3, 24, 40)).shape == (1, 11)


def test_rounds_of_pruning_and_files(pruned, digits_images, tmp_path):
    loaded = rebuilt(pruned, tmp_path)
    again = plan_of(loaded, random_keep(loaded, 2, fraction=0.5))
    sc.prune(loaded, again)
    sc.prune(pruned, again)
    twice = rebuilt(loaded, tmp_path)
    assert twice.blocks[0].attn.scale == 31**-0.5
    with torch.no_grad():
        assert torch.equal(twice(digits_images), pruned(digits_images))


def test_a_loaded_model_trains(pruned, digits_images, tmp_path):
    loaded = rebuilt(pruned, tmp_path)
    loaded.train()
    loaded(digits_images[:4]).sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


HAND = {"img_size": 12, "patch_size": 3, "embed_dim": 39, "depth": 2, "num_heads": 3, "num_classes": 7}


def test_a_model_built_by_hand_needs_its_factory(tmp_path):
    model = VisionTransformer(**HAND).eval()
    sc.prune(model, plan_of(model, random_keep(model, 1, fraction=0.5)))
    path = tmp_path / "hand.safetensors"
    with pytest.raises(sc.InvalidArgument, match=r"factory: expected \(name, kwargs\) that build the dense"):
        sc.save(model, path)
    assert not path.exists()
    loaded = rebuilt(model, tmp_path, factory=("VisionTransformer", HAND))
    rebuilt(loaded, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(loaded)
    assert torch.equal(scripted(images(loaded)), loaded(images(loaded)))
    with pytest.raises(sc.Unsupported, match="architecture: expected one that timm .* got 'os.system'"):
        sc.save(model, path, factory=("os.system", {}))
    for factory in ("VisionTransformer", ("VisionTransformer",), ("VisionTransformer", [1])):
        with pytest.raises(sc.InvalidArgument, match=r"factory: expected \(name, kwargs\), got"):
            sc.save(model, path, factory=factory)
    for argument in ("checkpoint_path", "pretrained", "pretrained_cfg_overlay", "features_only"):
        with pytest.raises(
            sc.InvalidArgument, match=f"arguments: expected those of the architecture, got '{argument}'"
        ):
            sc.save(model, path, factory=("vit_tiny_patch16_224", {argument: "weights.pth"}))
    assert not path.exists()


def test_saving_leaves_the_model_and_its_fingerprint_alone(tmp_path):
    model = VisionTransformer(**HAND).eval()
    stats = sc.calibrate(model, [images(model)])
    sc.save(model, tmp_path / "hand.safetensors", factory=("VisionTransformer", HAND))
    assert not hasattr(model, "secateur_factory")
    plan = sc.plan(model, stats, method="snp", ratios={"qk": 0.5})
    assert sc.prune(sc.load(tmp_path / "hand.safetensors"), plan).params == plan.params


def _own_module(model):
    model.blocks[0].mlp.act = nn.Sequential(nn.ReLU())


def _other_eps(model):
    model.blocks[0].attn.norm = nn.LayerNorm(model.blocks[0].attn.attn_dim, eps=0.5)


def _more_padding(model):
    model.patch_embed.proj.padding = (1, 1)


def _one_more(model):
    model.blocks[1].extra = nn.Identity()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_own_module, r"Sequential at blocks\.0\.mlp\.act where it builds GELU"),
        (_other_eps, r"LayerNorm at blocks\.0\.attn\.norm where it builds Identity"),
        (_more_padding, r"patch_embed\.proj \(.*padding=\(1, 1\)\) where it builds"),
        (_one_more, r"module blocks\.1\.extra"),
    ],
)
@pytest.mark.parametrize("made", ["timm", "by hand"])
def test_what_would_not_come_back_is_not_saved(change, text, made, tmp_path):
    path = tmp_path / "m.safetensors"
    if made == "timm":
        model, factory = timm.create_model("vit_tiny_patch16_224", **HAND), None
    else:
        model, factory = VisionTransformer(**HAND), ("VisionTransformer", HAND)
    change(model)
    with pytest.raises(sc.InvalidArgument, match="model: expected what .* is, got .*" + text):
        sc.save(model, path, factory=factory)
    assert not path.exists()


@pytest.mark.parametrize("kwargs", [{"embed_dim": 36}, {**HAND, "num_heads": 1}, {**HAND, "depht": 2}])
def test_a_factory_that_builds_another_model_is_refused(kwargs, tmp_path):
    model = VisionTransformer(**HAND).eval()
    with pytest.raises(sc.InvalidArgument, match="(model|arguments): expected"):
        sc.save(model, tmp_path / "wrong.safetensors", factory=("VisionTransformer", kwargs))
    assert not list(tmp_path.iterdir())


def test_a_file_whose_arguments_do_not_build_its_tensors(pruned, tmp_path):
    """Made by another program with checksums that are right: refused by name, nothing else is read."""
    path = tmp_path / "m.safetensors"
    sc.save(pruned, path)
    for change, text in (
        ({"embed_dim": 30}, "m.safetensors: expected a model that timm .* can build, got"),
        ({"checkpoint_path": "evil.pth"}, "got arguments: expected those of the architecture, got 'checkpoint_path'"),
        ({"num_classes": 11}, r"got head\.bias of shape \(10,\) where it builds \(11,\)"),
    ):
        header, tensors = container.read(path, "model")
        header["arguments"] |= change
        container.write(tmp_path / "m.safetensors", "model", header, tensors)
        with pytest.raises(sc.InvalidArgument, match=text):
            sc.load(path)
        sc.save(pruned, path)


def test_a_model_without_weights_is_not_saved(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", **HAND, device="meta")
    with pytest.raises(sc.InvalidArgument, match="model: expected weights, got none in"):
        sc.save(model, tmp_path / "m.safetensors")


def test_frozen_parameters_come_back_frozen(pruned, tmp_path):
    pruned.patch_embed.requires_grad_(False)
    loaded = rebuilt(pruned, tmp_path)
    frozen = [name for name, parameter in loaded.named_parameters() if not parameter.requires_grad]
    assert frozen == ["patch_embed.proj.weight", "patch_embed.proj.bias"]


def test_arguments_that_json_cannot_hold(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, act_layer=lambda: nn.GELU())
    with pytest.raises(
        sc.InvalidArgument, match=r"factory: expected \(name, kwargs\) of JSON values .*, got act_layer"
    ):
        sc.save(model, tmp_path / "m.safetensors")


def header_of(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def rewrite(path, header, body):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def test_every_changed_byte_is_found(pruned, tmp_path):
    path = tmp_path / "m.safetensors"
    sc.save(pruned, path)
    data = path.read_bytes()
    length = 8 + struct.unpack("<Q", data[:8])[0]
    positions = [0, 3, 8, *range(9, length, length // 40), length + 1, (length + len(data)) // 2, len(data) - 1]
    for position in positions:
        path.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        with pytest.raises((sc.InvalidArgument, sc.Unsupported), match="m.safetensors: expected a "):
            sc.load(path)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, -1])
def test_truncated_files(pruned, tmp_path, keep):
    path = tmp_path / "m.safetensors"
    sc.save(pruned, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(sc.InvalidArgument, match="expected a secateur model file, got one that is truncated"):
        sc.load(path)


def test_verify_false_trusts_the_data_but_not_the_header(pruned, tmp_path):
    path = tmp_path / "m.safetensors"
    sc.save(pruned, path)
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(bytes(data))
    assert sc.load(path, verify=False) is not None
    header, body = header_of(path)
    header["__metadata__"]["secateur"] = header["__metadata__"]["secateur"].replace("vit_tiny", "vit_base")
    rewrite(path, header, body)
    with pytest.raises(sc.InvalidArgument, match="header does not match its checksum"):
        sc.load(path, verify=False)


def test_other_files(pruned, digits_images, tmp_path):
    path = tmp_path / "m.safetensors"
    for content, text in (
        (b"PK\x03\x04 a zip, as torch.save writes", "truncated, damaged or no safetensors"),
        (b"", "truncated, damaged or no safetensors"),
    ):
        path.write_bytes(content)
        with pytest.raises(sc.InvalidArgument, match=text):
            sc.load(path)
    save_file(pruned.state_dict(), path)
    with pytest.raises(sc.InvalidArgument, match="a safetensors file that secateur did not write"):
        sc.load(path)
    sc.calibrate(make("plain"), [images(make("plain"))]).save(path)
    with pytest.raises(sc.InvalidArgument, match="expected a secateur model file, got a statistics file"):
        sc.load(path)
    for nothing in (tmp_path / "none", tmp_path):
        with pytest.raises(sc.InvalidArgument, match="which is not a file"):
            sc.load(nothing)


def test_a_newer_format(pruned, tmp_path):
    path = tmp_path / "m.safetensors"
    sc.save(pruned, path)
    header, body = header_of(path)
    outer = json.loads(header["__metadata__"]["secateur"])
    outer["format"] = 2
    header["__metadata__"]["secateur"] = json.dumps(outer)
    rewrite(path, header, body)
    with pytest.raises(sc.InvalidArgument, match="of format 1 or older, got format 2: update secateur"):
        sc.load(path)


def test_a_failed_save_leaves_the_old_file(pruned, tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    sc.save(pruned, path)
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("secateur.files.container.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        sc.save(pruned, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.skipif(sys.platform == "win32", reason="modes")
def test_files_have_the_mode_of_any_other(pruned, tmp_path):
    sc.save(pruned, tmp_path / "m.safetensors")
    (tmp_path / "other").touch()
    assert (tmp_path / "m.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_the_header_is_readable_by_anyone(pruned, tmp_path):
    path = tmp_path / "m.safetensors"
    sc.save(pruned, path)
    with safe_open(path, "pt") as file:
        outer = json.loads(file.metadata()["secateur"])
    fields = json.loads(outer["fields"])
    assert fields["architecture"] == "vit_tiny_patch16_224"
    assert fields["arguments"]["embed_dim"] == 93
    assert fields["sizes"]["blocks.0.qk"] == 19
    assert fields["versions"]["timm"] == timm.__version__


def described_by_json(kind):
    return kind not in ("gate", "hybrid") and not any(callable(value) for value in KINDS[kind].values())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if described_by_json(kind)])
def test_hand_built_kinds(kind, tmp_path):
    model = make(kind)
    sc.prune(model, plan_of(model, random_keep(model, 1, fraction=0.6)))
    kwargs = {**BASE, **KINDS[kind]}
    name = "VisionTransformerDistilled" if kwargs.pop("distilled", False) else "VisionTransformer"
    rebuilt(model, tmp_path, factory=(name, kwargs))


BIG = torch.arange(3 * 70_001, dtype=torch.float32).reshape(3, 70_001)


@pytest.mark.parametrize(
    "tensor",
    [
        BIG,
        BIG.T,
        BIG[:, ::2],
        BIG.flatten()[5::3],
        BIG[1:2, :66_000].reshape(1, 11, 6000)[..., 1::2],
        BIG[:, 1:].reshape(210, 10, 10, 10).to(memory_format=torch.channels_last),
        BIG[0, :1].expand(40_000, 2),
        BIG.to(torch.float16).T,
        torch.tensor(3),
        torch.zeros(0, 5),
    ],
    ids=lambda tensor: f"{tuple(tensor.shape)} {tensor.stride()}",
)
def test_a_digest_is_of_the_values_in_row_major_order(tensor):
    expected = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    assert container.digest(tensor) == expected
    assert container.digest(nn.Parameter(tensor, requires_grad=tensor.is_floating_point())) == expected
    if tensor.dtype is torch.float32:
        bits = tensor.to(torch.bfloat16)
        assert container.digest(bits) == hashlib.sha256(bits.view(torch.int16).numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_digests_do_not_depend_on_the_number_of_threads(threads):
    tensors = {name: BIG[:, : 7000 * index] for index, name in enumerate("hbdacgfe")}
    torch.set_num_threads(threads)
    found = container.digests(tensors)
    assert list(found) == sorted(tensors)
    assert found == {name: hashlib.sha256(x.numpy().tobytes()).hexdigest() for name, x in tensors.items()}
    assert container.digests({}) == {}


def test_the_eps_of_a_norm_of_the_stream_comes_back(tmp_path):
    """A change of the stream's basis leaves norms with an eps that no argument of timm's gives."""
    model = timm.create_model("vit_tiny_patch16_224", **HAND)
    model.blocks[1].norm2.eps = 0.5
    sc.save(model, tmp_path / "m.safetensors")
    again = sc.load(tmp_path / "m.safetensors")
    assert again.blocks[1].norm2.eps == 0.5
    assert again.blocks[0].norm2.eps == model.blocks[0].norm2.eps == 1e-6


def test_switches_of_training_do_not_keep_a_model_from_being_saved(tmp_path):
    model = VisionTransformerDistilled(**SMALL)
    model.set_distilled_training(True)
    sc.save(model, tmp_path / "model", factory=("VisionTransformerDistilled", SMALL))


@pytest.mark.parametrize(
    ("built", "more"),
    [
        ({}, {"dynamic_img_size": True}),
        ({}, {"no_embed_class": True}),
        ({"pos_embed": "none"}, {"class_token": False, "global_pool": "avg"}),
    ],
)
def test_what_would_compute_something_else_is_not_saved(tmp_path, built, more):
    model = VisionTransformer(**SMALL | built | more).eval()
    name = next(iter(more))
    with pytest.raises(
        sc.InvalidArgument, match=r"model: expected what VisionTransformer with its recorded arguments is"
    ):
        sc.save(model, tmp_path / "other", factory=("VisionTransformer", SMALL | built))
    assert not list(tmp_path.iterdir())
    sc.save(model, tmp_path / "same", factory=("VisionTransformer", SMALL | built | more))
    assert getattr(sc.load(tmp_path / "same"), name, more[name]) == more[name]


def test_what_users_hang_on_a_model_is_no_reason_to_refuse(tmp_path):
    model = small_vit()
    model.class_names = ("a", "b")
    model.blocks[0].note = "first"
    model.train()
    sc.save(model, tmp_path / "model", factory=("VisionTransformer", SMALL | {"mlp_ratio": 2.2}))
    images = small_batches()[0]
    assert torch.equal(sc.load(tmp_path / "model")(images), model.eval()(images))


def test_hooks_are_not_lost_without_a_word(tmp_path):
    model = small_vit()
    model.blocks[1].register_forward_hook(lambda *_: None)
    with pytest.warns(
        UserWarning, match=r"model: expected no forward hooks, .* got some at blocks\.1; saved without them"
    ):
        sc.save(model, tmp_path / "model", factory=("VisionTransformer", SMALL | {"mlp_ratio": 2.2}))
    assert (tmp_path / "model").is_file()
