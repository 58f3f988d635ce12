"""Checkpoints as timm's train.py writes them, by its CheckpointSaver: arguments, an average and an optimizer."""

from __future__ import annotations

import argparse

import pytest
import secateur as sc
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver, ModelEmaV3

NAME = "vit_tiny_patch16_224"
SMALL = {"embed_dim": 21, "depth": 2, "num_heads": 3}
# What train.py's parser gives by default, as far as it is about the model or its images, and some that is not.
DEFAULTS = {
    **dict.fromkeys(("num_classes", "gp", "img_size", "in_chans", "input_size", "crop_pct", "mean", "std", "lr", "aa")),
    **dict.fromkeys(("drop_path", "drop_connect", "drop_block", "bn_momentum", "bn_eps", "opt_betas", "torchcompile")),
    **dict.fromkeys(("initial_checkpoint", "resume", "interpolation"), ""),
    **{key: {} for key in ("opt_kwargs", "model_kwargs")},
    **dict.fromkeys(("distributed", "fast_norm", "amp"), False),
    "model": NAME,
    "pretrained": True,
    "drop": 0.0,
    "scale": [0.08, 1.0],
    "device": "cuda:0",
}


def train(folder, wrap=lambda model: model, /, build=None, **arguments):
    """Two epochs of one step; return the model and its average."""
    args = argparse.Namespace(**{**DEFAULTS, **arguments})
    torch.manual_seed(6)
    model = timm.create_model(args.model.partition(".")[0], **build)
    average = ModelEmaV3(model, decay=0.5)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=0.1)
    saver = CheckpointSaver(wrap(model), optimizer, args=args, model_ema=average, checkpoint_dir=str(folder))
    for epoch in range(2):
        images = torch.randn(4, *sc.inspect(model).input_size)
        torch.nn.functional.cross_entropy(model(images), torch.arange(4) % model.num_classes).backward()
        optimizer.step()
        average.update(model)
        saver.save_checkpoint(epoch, metric=50.0 + epoch)
    return model.eval(), average.module.eval()


def same(found, expected):
    assert list(found.state_dict()) == list(expected.state_dict())
    assert all(map(torch.equal, found.state_dict().values(), expected.state_dict().values()))
    x = torch.randn(2, *sc.inspect(expected).input_size)
    with torch.no_grad():
        assert torch.equal(found.eval()(x), expected(x))


# Options of train.py, and what it builds by them.
RUNS = {
    "defaults": ({"model_kwargs": SMALL}, SMALL),
    "classes": ({"num_classes": 7, "model_kwargs": SMALL}, {"num_classes": 7, **SMALL}),
    "classes of the data": ({"model_kwargs": SMALL}, {"num_classes": 13, **SMALL}),
    "image size": ({"img_size": 48, "model_kwargs": SMALL}, {"img_size": 48, **SMALL}),
    "input size": (
        {"input_size": [5, 32, 48], "num_classes": 3, "model_kwargs": SMALL},
        {"img_size": (32, 48), "in_chans": 5, "num_classes": 3, **SMALL},
    ),
    "arguments": (
        {"in_chans": 1, "gp": "avg", "model_kwargs": {"img_size": 40, "patch_size": 8, "reg_tokens": 2, **SMALL}},
        {"in_chans": 1, "global_pool": "avg", "img_size": 40, "patch_size": 8, "reg_tokens": 2, **SMALL},
    ),
    "weights' tag": ({"model": f"{NAME}.augreg_in21k", "model_kwargs": SMALL}, SMALL),
    "rates": (
        {"drop": 0.1, "drop_path": 0.2, "model_kwargs": SMALL},
        {"drop_rate": 0.1, "drop_path_rate": 0.2, **SMALL},
    ),
    # A size of images, which is no argument of a convolutional network.
    "no size of its own": ({"model": "resnet10t", "img_size": 96, "num_classes": 3}, {"num_classes": 3}),
}


@pytest.mark.parametrize("run", RUNS)
def test_its_arguments_say_the_model(run, tmp_path):
    options, build = RUNS[run]
    model, average = train(tmp_path, build=build, **options)
    path = tmp_path / "model_best.pth.tar"
    found, averaged = sc.load_dense(path), sc.load_dense(path, use_ema=True)
    same(found, model)
    same(averaged, average)
    assert not torch.equal(next(found.parameters()), next(averaged.parameters()))
    if run == "rates":
        assert found.blocks[1].drop_path1.drop_prob == pytest.approx(0.2)


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, torch.compile])
def test_it_unwraps_models(wrap, tmp_path):
    model, average = train(tmp_path, wrap, build=SMALL, model_kwargs=SMALL)
    same(sc.load_dense(tmp_path / "last.pth.tar"), model)
    same(sc.load_dense(tmp_path / "last.pth.tar", use_ema=True), average)


def test_what_the_images_were_prepared_by(tmp_path):
    said = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear", "crop_pct": 0.8}
    train(tmp_path, build=SMALL, model_kwargs=SMALL, **said)
    found = sc.load_dense(tmp_path / "last.pth.tar").pretrained_cfg
    assert {key: found[key] for key in said} == {**said, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    # By default it takes those of the weights.
    train(tmp_path, build=SMALL, model_kwargs=SMALL)
    found, plain = sc.load_dense(tmp_path / "last.pth.tar").pretrained_cfg, timm.get_pretrained_cfg(NAME)
    assert {key: found[key] for key in said} == {key: getattr(plain, key) for key in said}


def test_a_saver_without_arguments_names_a_class_alone(tmp_path):
    torch.manual_seed(6)
    model = timm.create_model(NAME, **SMALL).eval()
    saver = CheckpointSaver(model, create_optimizer_v2(model, opt="sgd", lr=0.1), checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(0)
    with pytest.raises(
        sc.InvalidArgument, match=r"since last\.pth\.tar names none but 'visiontransformer', which timm"
    ):
        sc.load_dense(tmp_path / "last.pth.tar")
    same(sc.load_dense(tmp_path / "last.pth.tar", model=NAME, **SMALL), model)
    with pytest.raises(sc.InvalidArgument, match=r"no moving average .*: leave out use_ema \(--use-ema\)"):
        sc.load_dense(tmp_path / "last.pth.tar", model=NAME, use_ema=True, **SMALL)


def test_the_user_goes_before_the_file(tmp_path):
    """A name alone takes the arguments of the file's own; another name takes none of them."""
    model, _ = train(tmp_path, build={"num_classes": 3, **SMALL}, num_classes=3, model_kwargs=SMALL, crop_pct=0.5)
    same(sc.load_dense(tmp_path / "last.pth.tar", model=NAME), model)
    same(sc.load_dense(tmp_path / "last.pth.tar", model=f"{NAME}.augreg_in21k"), model)
    assert sc.load_dense(tmp_path / "last.pth.tar", drop_path_rate=0.4).blocks[1].drop_path2.drop_prob > 0.3
    small = {"img_size": 224, **SMALL}
    found = sc.load_dense(tmp_path / "last.pth.tar", model="vit_small_patch16_224", **small)
    assert all(map(torch.equal, found.state_dict().values(), model.state_dict().values()))
    assert found.pretrained_cfg["crop_pct"] != 0.5
    with pytest.raises(sc.InvalidArgument, match="of another shape"):
        sc.load_dense(tmp_path / "last.pth.tar", model="vit_small_patch16_224")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"arch": "vit_small_patch16_224"}, "expected one model in last.pth, got vit_"),
        ({"args": {"model": NAME, "model_kwargs": {"checkpoint_path": "x"}}}, "architecture, got 'checkpoint_path'"),
        ({"args": {"model": NAME, "model_kwargs": {"pretrained": True}}}, "architecture, got 'pretrained'"),
        ({"args": {"model": NAME, "model_kwargs": {"depth": 10_000}}}, "depth, got 10000"),
        ({"args": {"model": NAME, "num_classes": 1 << 20}}, "num_classes, got 1048576"),
        ({"args": {"model": NAME, "drop": float("nan")}}, "drop_rate, got nan"),
        ({"args": {"model": NAME, "img_size": torch.ones(1)}}, "img_size, got Tensor"),
        ({"args": {"model": NAME, "model_kwargs": {"norm_layer": "<class 'x'>"}}}, "norm_layer, got"),
    ],
)
def test_settings_that_are_refused(settings, text, tmp_path):
    state = timm.create_model(NAME, **SMALL).state_dict()
    torch.save({"state_dict": state, "args": {"model": NAME}, **settings}, tmp_path / "last.pth")
    with pytest.raises(sc.InvalidArgument, match=text) as error:
        sc.load_dense(tmp_path / "last.pth")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"hyper_parameters": {"model_name": NAME, "n_classes": 3, **SMALL}},
        {"hparams": {"model": {"name": NAME, **SMALL}, "optimizer": {"name": "adam"}}},
        {"config": {"backbone": NAME, "image_size": 224, "in_channels": 3, **SMALL}},
        {"args": argparse.Namespace(model=NAME, nb_classes=3, input_size=224, drop_path=0.1, model_kwargs=SMALL)},
        {"arch": NAME, "args": {**SMALL, "model_ema": True, "data": "/data"}},
        {"hyper_parameters": {"arch": f"timm/{NAME}", "timm_model": NAME, "transform": [1, {2}], **SMALL}},
    ],
)
def test_settings_of_other_programs(settings, tmp_path):
    """Lightning's, DeiT's and people's own names for the same."""
    torch.manual_seed(6)
    model = timm.create_model(NAME, num_classes=3, **SMALL).eval()
    torch.save(
        {"state_dict": {f"model.{n}": t for n, t in model.state_dict().items()}, **settings}, tmp_path / "a.ckpt"
    )
    same(sc.load_dense(tmp_path / "a.ckpt"), model)
