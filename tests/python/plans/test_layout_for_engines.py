"""`prune(layout="auto", engine=…)`: the layout that the engine's exporter or runtime says."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import outside
import pytest
import secateur as sc
import torch
from secateur import check
from secateur.engines import EXPORTERS, RUNTIMES
from secateur.exports import Exporter
from secateur.families.vision_transformer.modules import PrunedAttention
from timm.layers import Attention

GUIDE = (Path(__file__).resolve().parents[3] / "docs/guides/export.md").read_text()
KNOWN = sorted({*EXPORTERS.names(), *RUNTIMES.names()})
RATIOS = {"qk": 0.5, "v": 0.3, "ffn": 0.4}
CLASSES = {"exact": PrunedAttention, "stock": Attention}


def of_the_guide():
    """Layouts by engine, as the table of the section says: `a`, `b` | layout | why."""
    section = GUIDE.split("## Which layout\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]*`) \| `(exact|stock)` \|", section, re.MULTILINE)
    return {name: layout for names, layout in rows for name in re.findall(r"`([^`]+)`", names)}


def cut(dense, **how):
    model = copy.deepcopy(dense)
    report = sc.prune(model, sc.plan(model, method="magnitude", ratios=RATIOS), **how)
    return model, report


def same(one, other):
    """All bits, and the classes of all modules."""
    first, second = one.state_dict(), other.state_dict()
    assert [type(module) for module in one.modules()] == [type(module) for module in other.modules()]
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def registries(monkeypatch):
    """What a test registers is forgotten after it."""
    for registry in (EXPORTERS, RUNTIMES):
        registry.names()
        monkeypatch.setattr(registry, "_found", dict(registry._found))


def registered(registry, given, said):
    class Outside:
        name = given
        version = "1"

        def export(self, model, path, options): ...

        def prepare(self, module, example): ...

    if said is not None:
        Outside.layout = said
    registry.register(Outside)


def test_the_guide_tells_all_engines_and_no_others():
    assert sorted(of_the_guide()) == KNOWN


@pytest.mark.parametrize("engine", KNOWN)
def test_it_is_the_layout_of_the_guide_chosen_by_hand(engine, digits_model, monkeypatch):
    """Also where the engine is not installed."""

    def none(argument, extra, *names):
        raise AssertionError(f"{names} asked for")

    monkeypatch.setattr(check, "packages", none)
    layout = of_the_guide()[engine]
    found, report = cut(digits_model, layout="auto", engine=engine)
    wanted, expected = cut(digits_model, layout=layout)
    assert type(found.blocks[0].attn) is CLASSES[layout]
    assert same(found, wanted)
    assert report == expected


def test_without_an_engine_it_is_torch(digits_model, registries, monkeypatch):
    assert same(cut(digits_model, layout="auto")[0], cut(digits_model, layout="exact")[0])
    monkeypatch.setattr(type(EXPORTERS.named("torch")), "layout", "stock")
    assert same(cut(digits_model, layout="auto")[0], cut(digits_model, layout="stock")[0])
    # The default of prune is no engine's.
    assert same(cut(digits_model)[0], cut(digits_model, layout="exact")[0])


@pytest.mark.parametrize(("said", "layout"), [("stock", "stock"), ("exact", "exact"), (None, "exact")])
@pytest.mark.parametrize("registry", [EXPORTERS, RUNTIMES], ids=["exporter", "runtime"])
def test_a_class_from_outside_says_its_own(registry, said, layout, digits_model, registries):
    registered(registry, "outside", said)
    assert same(cut(digits_model, layout="auto", engine="outside")[0], cut(digits_model, layout=layout)[0])


def test_an_exporter_is_asked_before_a_runtime_of_its_name(digits_model, registries):
    registered(RUNTIMES, "outside", "exact")
    registered(EXPORTERS, "outside", "stock")
    assert same(cut(digits_model, layout="auto", engine="outside")[0], cut(digits_model, layout="stock")[0])


def test_a_subclass_of_exporter_that_says_nothing_prefers_exact():
    class Silent(Exporter):
        name = "silent"

    assert Silent.layout == "exact"


def test_an_installed_exporter_is_asked_before_anything_of_exports_is_imported(tmp_path):
    text = """
    from secateur.exports import Exporter, register

    @register
    class Mine(Exporter):
        name = "mine"
        layout = "stock"
        def export(self, model, path, options): ...
    """
    folder = outside.installed(tmp_path, {"mine_outside": text}, {"secateur.exporters": {"mine": "mine_outside:Mine"}})
    outside.run(
        folder,
        """
        import sys
        import secateur as sc
        import timm

        model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=3)
        plan = sc.plan(model, method="magnitude", ratios={"qk": 0.5})
        assert "secateur.exports.onnx" not in sys.modules
        sc.prune(model, plan, layout="auto", engine="mine")
        assert all(type(block.attn) is timm.layers.Attention for block in model.blocks)
        """,
    )


@pytest.mark.parametrize("engine", ["tensorrt", "", "CoreML", 3, ["onnx"]])
def test_an_unknown_engine_lists_those_there_are(engine, digits_model):
    text = f"engine: expected one of {', '.join(KNOWN)}, got {engine!r}"
    assert_refused(digits_model, text, layout="auto", engine=engine)


@pytest.mark.parametrize("layout", ["exact", "stock"])
def test_an_engine_goes_with_auto_alone(layout, digits_model):
    text = f"engine: expected none unless layout is 'auto', got 'coreml' with {layout!r}"
    assert_refused(digits_model, text, layout=layout, engine="coreml")


def test_an_engine_alone_is_refused(digits_model):
    assert_refused(
        digits_model, "engine: expected none unless layout is 'auto', got 'onnx' with 'exact'", engine="onnx"
    )


def test_an_exporter_that_says_no_layout_is_named(digits_model, registries):
    registered(EXPORTERS, "outside", "dense")
    text = "engine: expected 'outside' to prefer one of exact, stock, got 'dense'"
    assert_refused(digits_model, text, layout="auto", engine="outside")


def assert_refused(model, text, **how):
    """By prune and prune_sequential, with nothing changed."""
    before = copy.deepcopy(model)
    plan = sc.plan(model, method="magnitude", ratios=RATIOS)
    with pytest.raises(sc.InvalidArgument, match=f"^{re.escape(text)}$"):
        sc.prune(model, plan, **how)
    with pytest.raises(sc.InvalidArgument, match=f"^{re.escape(text)}$"):
        sc.prune_sequential(model, [], "magnitude", ratios=RATIOS, **how)
    assert same(model, before)


@pytest.mark.parametrize("method", ["project", "magnitude"])
def test_pruning_block_by_block_takes_the_same(method, digits_model, digits_images, registries):
    registered(EXPORTERS, "outside", "stock")
    batches, found = list(digits_images[:33].split(11)), []
    for how in ({"layout": "auto", "engine": "outside"}, {"layout": "stock"}):
        found.append(copy.deepcopy(digits_model))
        sc.prune_sequential(found[-1], batches, method, ratios=RATIOS, **how)
    assert type(found[0].blocks[0].attn) is Attention
    assert same(*found)


def test_a_folder_of_timm_holds_what_was_pruned_for_timm(digits_model, tmp_path):
    """The same bits as in the model itself, which nothing pads afterwards."""
    from safetensors.torch import load_file

    model, report = cut(digits_model, layout="auto", engine="timm")
    sc.export(model, tmp_path / "made", format="timm", factory=None)
    written = load_file(tmp_path / "made" / "model.safetensors")
    state = model.state_dict()
    assert written.keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in written.items())
    assert report.params[1] == sum(value.numel() for value in written.values())
