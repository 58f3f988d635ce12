"""Compiled, exported, traced and scripted models where models are run: `evaluate`, `bench` and `data.loader`."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import secateur as sc
import timm
import torch
from PIL import Image
from secateur.data import loader
from secateur.errors import InvalidArgument
from small_vits import small_vit
from timm.data import create_transform
from torch import nn
from torch.nn import functional

IMAGES = torch.randn(7, 3, 12, 12, generator=torch.Generator().manual_seed(3))
CLASSES = torch.tensor([0, 4, 1, 1, 3, 2, 0])
BATCHES = [(IMAGES[:4], CLASSES[:4]), (IMAGES[4:], CLASSES[4:])]
BATCH = ({0: torch.export.Dim("batch", min=1, max=64)},)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit calls itself old
        yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def model():
    """Its classes are those of most of the images, so that a wrong output shows."""
    found = small_vit(seed=2)
    with torch.no_grad():
        features = found.forward_head(found.forward_features(IMAGES), pre_logits=True)
        solved = torch.linalg.lstsq(
            torch.cat([features, torch.ones(7, 1)], 1), functional.one_hot(CLASSES, 5).float() * 4
        ).solution
        found.head.weight.copy_(solved[:-1].T)
        found.head.bias.copy_(solved[-1])
    return found


def exported(model, dynamic=BATCH):
    return torch.export.export(model, (IMAGES[:4],), dynamic_shapes=dynamic)


def from_file(model, folder):
    torch.export.save(exported(model), folder / "model.pt2")
    return torch.export.load(folder / "model.pt2").module()


FORMS = {
    "compiled": lambda model, _: torch.compile(model, backend="eager"),
    "program": lambda model, _: exported(model),
    "module of a program": lambda model, _: exported(model).module(),
    "unflattened": lambda model, _: torch.export.unflatten(exported(model)),
    "of a file": from_file,
    "compiled module of a program": lambda model, _: torch.compile(exported(model).module(), backend="eager"),
    "fx": lambda model, _: torch.fx.symbolic_trace(model),
    "traced": lambda model, _: torch.jit.trace(model, IMAGES),
    "scripted": lambda model, _: torch.jit.script(model),
    "frozen": lambda model, _: torch.jit.freeze(torch.jit.script(model)),
    "data parallel": lambda model, _: nn.DataParallel(model),
}


# Forms that tell the size of their input.
TELLING = [form for form in FORMS if "program" in form or form in ("compiled", "of a file", "data parallel")]


@pytest.mark.parametrize("form", FORMS)
def test_evaluate_and_bench(model, tmp_path, form):
    with torch.inference_mode():
        logits = model(IMAGES)
    expected = sum(float(-logits[i].double().log_softmax(0)[CLASSES[i]]) for i in range(7)) / 7
    hits = 100 * sum(int(logits[i].argmax()) == CLASSES[i] for i in range(7)) / 7
    assert hits > 50
    made = FORMS[form](copy.deepcopy(model), tmp_path)
    found = sc.evaluate(made, BATCHES)
    assert (found.images, found.top1) == (7, pytest.approx(hits))
    assert found.loss == pytest.approx(expected, rel=1e-5)
    size = None if form in TELLING else (3, 12, 12)
    report = sc.bench(made, copy.deepcopy(model), batch_size=2, repeats=1, warmup=1, input_size=size)
    assert (report.batch_size, report.input_size) == (2, (3, 12, 12))
    assert report.speedup is not None
    assert report.speedup > 0


def test_modes_are_as_before(model):
    dropping = small_vit(proj_drop_rate=0.5, pos_drop_rate=0.5)
    with torch.inference_mode():
        hits = float((dropping(IMAGES).argmax(1) == CLASSES).float().mean())
    for make in (lambda each: torch.compile(each, backend="eager"), torch.jit.script, torch.fx.symbolic_trace):
        made = make(copy.deepcopy(dropping)).train()
        assert sc.evaluate(made, BATCHES).top1 == pytest.approx(100 * hits)
        assert all(module.training for module in made.modules())


def test_a_program_exported_in_training_mode_is_refused():
    """It would drop at random whatever mode is asked for."""
    dropping = small_vit(proj_drop_rate=0.5).train()
    program = exported(dropping)
    for made in (program, program.module()):
        with pytest.raises(InvalidArgument) as caught:
            sc.evaluate(made, BATCHES)
        assert str(caught.value) == (
            "model: expected a program exported in evaluation mode, got one exported in training mode, with dropout or "
            "batch norms that learn"
        )
        with pytest.raises(InvalidArgument, match="^model: expected a program exported in evaluation mode, got"):
            sc.bench(made, batch_size=2, repeats=1, warmup=0)
    # Without dropout the mode makes no difference.
    still = small_vit()
    assert sc.evaluate(exported(still.train()).module(), BATCHES) == sc.evaluate(still.eval(), BATCHES)


def test_programs_with_batch_norms():
    """A convolutional network's program, in both modes."""
    torch.manual_seed(0)
    network = timm.create_model("resnet10t", num_classes=5).eval()
    images = torch.randn(4, 3, 32, 32)
    classes = network(images).argmax(1)
    program = torch.export.export(network, (images,))
    assert sc.evaluate(program, [(images, classes)]).top1 == 100
    learns = torch.export.export(network.train(), (images,))
    with pytest.raises(InvalidArgument, match="batch norms that learn$"):
        sc.evaluate(learns, [(images, classes)])


def test_a_fixed_batch_size_is_told(model):
    made = exported(model, None)
    assert sc.evaluate(made, BATCHES[:1]).images == 4
    with pytest.raises(InvalidArgument) as caught:
        sc.evaluate(made, BATCHES)
    text = str(caught.value)
    assert text.startswith("loader: expected batches of the shape that the graph was made for, got (3, 3, 12, 12) (")
    assert text.endswith("); export with a dynamic batch size, or pass batches of one size")
    with pytest.raises(InvalidArgument, match=r"^model: .*\(2, 3, 12, 12\)"):
        sc.bench(made, batch_size=2, repeats=1, warmup=0)


def test_programs_do_not_train(model):
    with pytest.raises(InvalidArgument, match="^model: expected one that can train, got the module of an exported pro"):
        sc.finetune(exported(model).module(), BATCHES, epochs=1)


@pytest.fixture
def folder(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(2):
            seed = number + 10 * len(list(tmp_path.iterdir()))
            pixels = np.random.default_rng(seed).integers(0, 256, (23, 31, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    return tmp_path


MEAN, STD = (0.4, 0.45, 0.5), (0.2, 0.25, 0.3)


def by_hand(folder, **other):
    prepare = create_transform((3, 12, 12), mean=MEAN, std=STD, **other)
    return torch.stack([prepare(Image.open(path)) for path in sorted(folder.glob("*/*.png"))])


@pytest.mark.parametrize("form", ["compiled", "data parallel"])
def test_loaders_look_into_compiled_and_parallel_models(model, folder, form):
    known = copy.deepcopy(model)
    known.pretrained_cfg = {"mean": MEAN, "std": STD, "crop_pct": 0.8, "interpolation": "bilinear"}
    made = FORMS[form](known, None)
    (images, targets) = next(iter(loader(str(folder), made)))
    assert torch.equal(images, by_hand(folder, crop_pct=0.8, interpolation="bilinear"))
    assert targets.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("form", ["program", "module of a program", "compiled module of a program", "unflattened"])
def test_loaders_ask_a_graph_for_what_it_does_not_tell(model, folder, tmp_path, form):
    made = FORMS[form](model, tmp_path)
    given = {"mean": MEAN, "std": STD}
    images, _ = next(iter(loader(str(folder), made, **given)))
    assert torch.equal(images, by_hand(folder, crop_pct=0.875, interpolation="bicubic"))
    with pytest.raises(InvalidArgument) as caught:
        loader(str(folder), made)
    assert str(caught.value).startswith("mean: expected mean=, std= of the model that the graph was made of, which ")
    with pytest.raises(InvalidArgument, match="^std: expected std= of the model"):
        loader(str(folder), made, mean=MEAN)


@pytest.mark.parametrize("form", ["fx", "traced", "scripted"])
def test_graphs_without_shapes_are_asked_for_all(model, folder, form):
    made = FORMS[form](model, None)
    with pytest.raises(InvalidArgument, match="^input_size: expected input_size=, mean=, std= of the model that the"):
        loader(str(folder), made)
    images, _ = next(iter(loader(str(folder), made, input_size=(3, 12, 12), mean=MEAN, std=STD)))
    assert torch.equal(images, by_hand(folder, crop_pct=0.875, interpolation="bicubic"))
    with pytest.raises(InvalidArgument, match="^input_size: expected "):
        sc.bench(made, batch_size=2, repeats=1)


def test_a_program_of_free_size(folder):
    free = small_vit(dynamic_img_size=True)
    sides = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    made = torch.export.export(free, (torch.randn(2, 3, 12, 12),), dynamic_shapes=(sides,))
    given = {"mean": MEAN, "std": STD}
    with pytest.raises(InvalidArgument, match="^input_size: expected input_size= of the model"):
        loader(str(folder), made, **given)
    images, _ = next(iter(loader(str(folder), made, input_size=(3, 12, 12), **given)))
    assert torch.equal(images, by_hand(folder, crop_pct=0.875, interpolation="bicubic"))
    with pytest.raises(InvalidArgument, match="^input_size: expected "):
        sc.bench(made, batch_size=2, repeats=1)
    assert sc.bench(made, batch_size=2, repeats=1, warmup=0, input_size=12).input_size == (3, 12, 12)


def test_models_tell_their_own_size(model, folder):
    with pytest.raises(InvalidArgument, match="^input_size: expected none for a model that tells it, got"):
        loader(str(folder), torch.compile(model, backend="eager"), input_size=(3, 12, 12))
