"""The command line on checkpoints as they are: which file says the model, and which of its weights are taken."""

from __future__ import annotations

import argparse
import json
import re

import pytest
import secateur as sc
import timm
import torch
from digits import architecture
from secateur.cli.app import main
from secateur.data.loader import loader
from timm.models import save_for_hf

NAME = "vit_tiny_patch16_224"
KWARGS = {"img_size": 32, "patch_size": 4, "embed_dim": 93, "num_heads": 3, "depth": 3}
DATA = ["--data", "digits", "--max-images", 32]


@pytest.fixture
def run(capsys):
    """Run the command line; return exit code, stdout and stderr in one line."""

    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, " ".join(re.sub("[│╭╮╰╯─]", " ", captured.err).split())

    return call


@pytest.fixture
def run_json(run):
    def call(*arguments):
        code, out, err = run(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return call


@pytest.fixture
def failure(run):
    """Run a command that must fail in one line, and return it."""

    def call(*arguments, code=1):
        found, out, err = run(*arguments)
        assert (found, out) == (code, ""), err
        assert "Traceback" not in err
        return err.removeprefix("secateur: ")

    return call


@pytest.fixture
def random_model():
    torch.manual_seed(8)
    return architecture().eval()


@pytest.fixture
def trained(digits_model, random_model, tmp_path):
    """Return timm's checkpoint of weights that know nothing, whose average knows the digits."""
    args = argparse.Namespace(model=NAME, num_classes=10, img_size=None, model_kwargs=KWARGS, lr=0.1)
    states = {"state_dict": random_model.state_dict(), "state_dict_ema": digits_model.state_dict()}
    torch.save({"epoch": 3, "arch": NAME, "args": args, "metric": 9.0, **states}, tmp_path / "model_best.pth.tar")
    return tmp_path / "model_best.pth.tar"


@pytest.fixture
def state(digits_model, tmp_path):
    """Return a file of weights that says nothing else."""
    torch.save(digits_model.state_dict(), tmp_path / "state.pth")
    return tmp_path / "state.pth"


def weights_in(path):
    return sc.load(path).state_dict()


def equal(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], each) for name, each in expected.items())


def test_the_average_is_what_every_command_takes(run_json, failure, trained, digits_model, random_model, tmp_path):
    """Weights and average differ in what each command finds; each is the function's of the model with them."""
    for model, options in ((random_model, []), (digits_model, ["--use-ema"])):
        common = ["--checkpoint", trained, *options]
        found = run_json("evaluate", *common, *DATA)
        expected = sc.evaluate(model, loader("digits", model, max_images=32, shuffle=True))
        assert (found["top1"], found["loss"]) == (expected.top1, expected.loss)
        assert (found["top1"] > 90) == bool(options)

        stats, plan, pruned = (tmp_path / name for name in ("s.st", "p.json", "pruned.st"))
        run_json("calibrate", *common, *DATA, "--out", stats)
        images = loader("digits", model, split="train", batch_size=64, max_images=32, shuffle=True)
        expected = sc.plan(model, sc.calibrate(model, images, max_images=32), ratios={"ffn": 0.5})
        run_json("plan", *common, "--stats", stats, "--ratios", '{"ffn": 0.5}', "--out", plan)
        assert sc.Plan.load(plan).to_dict() == expected.to_dict()
        other = [] if options else ["--use-ema"]
        for command in (
            ["plan", "--stats", stats, "--ratios", '{"ffn": 0.5}', "--out", tmp_path / "none"],
            ["prune", "--plan", plan, "--out", tmp_path / "none"],
        ):  # the other's weights are told from these
            assert "weights" in failure(*command, "--checkpoint", trained, *other)
        run_json("prune", *common, "--plan", plan, "--out", pruned)
        run_json("export", *common, "--format", "native", "--out", tmp_path / "dense.st")
        assert equal(weights_in(tmp_path / "dense.st"), model.state_dict())
        sc.prune(model, expected)
        assert equal(weights_in(pruned), model.state_dict())


def test_no_command_needs_the_model_twice(run_json, state, digits_model, tmp_path):
    """After calibrate, statistics, plan and pruned model say the model of a file of weights, and its size."""
    model = ["--model", NAME, "--model-kwargs", json.dumps(KWARGS)]
    stats, plan, pruned, tuned = (tmp_path / name for name in ("s.st", "p.json", "pruned.st", "tuned.st"))
    run_json("calibrate", *model, "--checkpoint", state, *DATA, "--out", stats)
    run_json("plan", "--checkpoint", state, "--stats", stats, "--target-macs", 0.7, "--out", plan)
    run_json("prune", "--checkpoint", state, "--plan", plan, "--out", pruned)
    expected = sc.prune(digits_model, sc.Plan.load(plan))
    assert equal(weights_in(pruned), digits_model.state_dict())
    assert expected.macs[1] <= 0.7 * expected.macs[0]

    for said in (stats, plan, pruned):  # a pruned model's file says the dense one that it was
        found = run_json("evaluate", "--checkpoint", state, "--model", said, *DATA)
        assert found["top1"] > 90
        assert run_json("inspect", "--model", said)["macs"] == expected.macs[0]
    assert run_json("evaluate", "--checkpoint", pruned, *DATA)["images"] == 32
    found = run_json("bench", "--checkpoint", pruned, "--reference", state, "--repeats", 1, "--batch-size", 1)
    assert found["reference_images_per_second"] > 0
    found = run_json("bench", "--checkpoint", state, "--reference", pruned, "--repeats", 1, "--batch-size", 1)
    assert found["input_size"] == [3, 32, 32]
    training = ["--steps", 2, "--lr", 1e-4, "--batch-size", 16, "--out", tuned]
    found = run_json("finetune", "--checkpoint", pruned, "--teacher", state, *DATA, *training)
    assert found["steps"] == 2
    assert {name: each.shape for name, each in weights_in(tuned).items()} == {
        name: each.shape for name, each in weights_in(pruned).items()
    }
    run_json("finetune", "--checkpoint", state, "--teacher", pruned, *DATA, *training)
    run_json("prune", "--checkpoint", state, "--model", stats, "--data", "digits", "--max-images", 16,
             "--ratios", '{"ffn": 0.5}', "--method", "magnitude", "--out", pruned)  # fmt: skip
    search = ["--macs", 0.9, "--rounds", 1, "--method", "snp", "--round-to", 1, "--out", tmp_path / "found.st"]
    run_json("search", "--checkpoint", state, "--stats", stats, *DATA, *search)
    run_json("export", "--checkpoint", state, "--model", plan, "--format", "native", "--out", tmp_path / "e.st")
    assert equal(weights_in(tmp_path / "e.st"), torch.load(state))


def test_the_teacher_is_of_the_weights_that_were_named(run_json, failure, trained, state, random_model, tmp_path):
    """At no share of the labels, the loss of the first step is the distance to the teacher: none from itself."""
    dense = tmp_path / "dense.st"
    sc.save(random_model, dense)
    training = [*DATA, "--alpha", 1, "--steps", 1, "--lr", 1e-12, "--batch-size", 32, "--out", tmp_path / "out.st"]
    itself = run_json("finetune", "--checkpoint", dense, "--teacher", trained, *training)
    other = run_json("finetune", "--checkpoint", dense, "--teacher", state, *training)
    assert itself["history"][0]["loss"] < 1e-3 < other["history"][0]["loss"]
    (tmp_path / "bad.pth").write_bytes(b"no more")
    assert failure("finetune", "--checkpoint", dense, "--teacher", tmp_path / "bad.pth", *training).startswith(
        "--teacher: expected a checkpoint of torch.save or a .safetensors file, got "
    )


def test_what_the_user_says_goes_before_the_files(run_json, failure, trained, digits_model, tmp_path):
    """Classes and arguments of the command line, then of statistics, then of the checkpoint."""
    stats = tmp_path / "s.st"
    images = loader("digits", digits_model, split="train", max_images=8)
    sc.calibrate(digits_model, images).save(stats)
    # The file says 10 classes.
    plan = ["plan", "--stats", stats, "--ratios", '{"ffn": 0.5}', "--out", tmp_path / "p.json"]
    text = failure(*plan, "--checkpoint", trained, "--use-ema", "--num-classes", 3)
    assert text.startswith(f"--checkpoint: expected the parameters of '{NAME}', got others in model_best.pth.tar: ")
    assert "pass num_classes=10 (--num-classes 10)" in text
    kwargs = json.dumps({**KWARGS, "depth": 2})
    text = failure("inspect", "--checkpoint", trained, "--model-kwargs", kwargs)
    assert "12 unexpected (blocks.2.norm1.weight" in text
    assert "pass depth=3 (--model-kwargs '{\"depth\": 3}')" in text
    rates = run_json("inspect", "--checkpoint", trained, "--model-kwargs", '{"drop_rate": 0.1}')
    assert rates["macs"] == sc.inspect(digits_model).macs


def test_files_that_disagree(failure, state, trained, digits_model, tmp_path):
    """Statistics of another model, weights of another model: the text names the file and what differs."""
    torch.manual_seed(1)
    other = timm.create_model(NAME, **{**KWARGS, "embed_dim": 48}, num_classes=10).eval()
    stats, plan = tmp_path / "other.st", tmp_path / "other.json"
    found = sc.calibrate(other, [torch.rand(8, 3, 32, 32) * 2 - 1])
    found.save(stats)
    sc.plan(other, found, ratios={"ffn": 0.5}).save(plan)
    out = ["--out", tmp_path / "out"]
    for checkpoint in (state, trained):
        for command in (["plan", "--stats", stats, "--ratios", '{"ffn": 0.5}', *out], ["prune", "--plan", plan, *out]):
            text = failure(*command, "--checkpoint", checkpoint)
            assert text.startswith(
                f"--checkpoint: expected the parameters of '{NAME}', got others in {checkpoint.name}"
            )
            assert "of another shape (cls_token (1, 1, 93) for (1, 1, 48)" in text
    # A file of secateur's says its model, and is not read as another.
    sc.save(digits_model, tmp_path / "dense.st")
    dense = ["--checkpoint", tmp_path / "dense.st"]
    for more in (
        ["--model", NAME],
        ["--model", stats],
        ["--num-classes", 10],
        ["--model-kwargs", '{"depth": 3}'],
        ["--use-ema"],
    ):
        assert failure("inspect", *dense, *more).startswith("--checkpoint: expected a plain state dict with --model")
    assert failure("prune", *dense, "--plan", plan, *out) != ""
    # Neither is a state dict a description.
    for name in (state, trained):
        text = failure("inspect", "--model", name)
        assert text.startswith("model: expected a plan, statistics or model file of secateur, got ")


def test_files_that_say_nothing(failure, state, digits_model, tmp_path):
    """What to pass is said, by the name of the option that was used."""
    out = ["--out", tmp_path / "out.st"]
    needed = f"model: expected a timm name (--model NAME), since {state.name} names none"
    for command in (
        ["inspect"], ["calibrate", *DATA, *out], ["evaluate", *DATA], ["bench"], ["finetune", *DATA, *out],
        ["export", "--format", "native", *out],
        ["plan", "--method", "magnitude", "--ratios", '{"ffn": 0.5}', *out],
        ["prune", *DATA, "--ratios", '{"ffn": 0.5}', *out],
    ):  # fmt: skip
        assert failure(*command, "--checkpoint", state) == f"--checkpoint: {needed}", command
    assert failure("bench", "--checkpoint", state, "--reference", state) == f"--checkpoint: {needed}"
    model = ["--model", NAME, "--model-kwargs", json.dumps(KWARGS)]
    assert failure("bench", *model, "--checkpoint", state, "--reference", state) == f"--reference: {needed}"
    assert failure("finetune", *DATA, *out, *model, "--checkpoint", state, "--teacher", state) == f"--teacher: {needed}"


def test_plans_of_models_that_timm_did_not_name(failure, tmp_path):
    """Such a plan is no answer to which model it is; a checkpoint's own answer is another model."""
    arguments = {"img_size": 32, "embed_dim": 21, "depth": 2, "num_heads": 3, "num_classes": 10}
    by_class = timm.create_model(NAME, **arguments, act_layer=torch.nn.ReLU).eval()
    by_hand = timm.models.VisionTransformer(**arguments).eval()
    plan, file, out = tmp_path / "p.json", tmp_path / "model.pth", ["--out", tmp_path / "out.st"]
    for model, why in ((by_class, "does not say it (arguments: expected a plain value of act_layer, got '<ReLU>'"),
                       (by_hand, "is about a model built by hand (VisionTransformer)")):  # fmt: skip
        sc.plan(model, method="magnitude", ratios={"ffn": 0.5}).save(plan)
        torch.save(model.state_dict(), file)
        text = failure("prune", "--checkpoint", file, "--plan", plan, *out)
        assert text.startswith(
            f"--checkpoint: model: expected a timm name (--model NAME), got --plan {plan}, which {why}"
        )
        text = failure("inspect", "--model", plan)
        assert text.startswith(f"model: expected a timm name (--model NAME), got p.json, which {why}")
        torch.save({"state_dict": model.state_dict(), "args": {"model": NAME, **arguments}}, file)
        text = failure("prune", "--checkpoint", file, "--plan", plan, *out)
        assert text.startswith("model: expected the same model, got ")


def test_statistics_say_the_model_and_hold_no_weights(failure, run_json, digits_model, tmp_path):
    stats = tmp_path / "s.st"
    sc.calibrate(digits_model, loader("digits", digits_model, max_images=8)).save(stats)
    text = failure("evaluate", *DATA, "--model", stats, code=2)
    assert "expected --checkpoint FILE or --pretrained (or --no-pretrained for random weights): s.st says the" in text
    assert f"{NAME}, and holds no weights" in text
    assert run_json("evaluate", *DATA, "--model", stats, "--no-pretrained")["images"] == 32
    text = failure("plan", "--stats", stats, "--ratios", '{"ffn": 0.5}', "--out", tmp_path / "p.json", code=2)
    assert f"{stats} says the model".replace(" ", "") in text.replace(" ", "")  # typer's box breaks the path


@pytest.mark.parametrize("safe", [False, True, "both"])
def test_folders(safe, run_json, failure, digits_model, tmp_path, monkeypatch):
    """Of timm's, by a path or timm's name for it; --model takes the name, as timm does."""
    monkeypatch.chdir(tmp_path)
    save_for_hf(digits_model, "folder", safe_serialization=safe)
    expected = sc.evaluate(digits_model, loader("digits", digits_model, max_images=32, shuffle=True))
    for model in (["--checkpoint", "folder"], ["--checkpoint", "local-dir:folder"], ["--model", "local-dir:folder"]):
        assert run_json("evaluate", *model, *DATA)["loss"] == expected.loss
    random = run_json("evaluate", "--model", "local-dir:folder", "--no-pretrained", *DATA)
    assert random["loss"] != expected.loss
    assert failure("inspect", "--model", "local-dir:none").startswith("--model: expected a folder with timm's config")
    assert failure("inspect", "--checkpoint", "folder", "--model", NAME).startswith(
        "--checkpoint: expected neither model nor use_ema (--use-ema) with 'folder', got one"
    )
    torch.save(digits_model.state_dict(), "state.pth")
    assert failure("inspect", "--checkpoint", "state.pth", "--model", "local-dir:folder").startswith(
        "--checkpoint: model: expected a timm name for state.pth, got 'local-dir:folder', whose weights are its own"
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["evaluate", *DATA, "--use-ema", "--model", NAME, "--no-pretrained"], "--use-ema needs --checkpoint FILE"),
        (["evaluate", *DATA], "expected --checkpoint FILE or --model NAME"),
        (["finetune", *DATA, "--out", "o", "--teacher", "t", "--teacher-pretrained"], "expected --checkpoint FILE or"),
    ],
)
def test_options_that_do_not_go_together(arguments, text, failure, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert text in failure(*arguments, code=2)


def test_options_of_the_second_model(failure, digits_model, tmp_path):
    """The same rules, under its own names."""
    dense = tmp_path / "dense.st"
    sc.save(digits_model, dense)
    common = ["finetune", *DATA, "--out", tmp_path / "out.st", "--checkpoint", dense]
    assert "expected --teacher or --teacher-pretrained, got both" in failure(
        *common, "--teacher", dense, "--teacher-pretrained", code=2
    )
    text = failure(*common, "--teacher-model", NAME, code=2)
    assert "expected --teacher FILE or --teacher-pretrained" in text
    assert "no-pretrained" not in text
    # timm's weights have a thousand classes, and this has ten.
    text = failure(*common, "--teacher-pretrained")
    assert text.startswith("--teacher: expected a file, since dense.st is of 10 classes, got --teacher-pretrained")
    text = failure(*common, "--teacher-model", "no_such_vit")
    assert "expected a model that timm can build, got 'no_such_vit'" in text


def test_a_checkpoint_without_an_average(failure, run_json, state, tmp_path):
    model = ["--model", NAME, "--model-kwargs", json.dumps(KWARGS)]
    text = failure("evaluate", *model, "--checkpoint", state, "--use-ema", *DATA)
    assert "it holds no moving average of the weights (state_dict_ema), only cls_token, " in text
    assert "leave out use_ema (--use-ema)" in text
