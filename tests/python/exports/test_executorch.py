"""ExecuTorch's programs. What needs ExecuTorch, which no extra for tests brings, is skipped without it."""

from __future__ import annotations

import importlib.machinery
import sys
import types
import warnings
from collections import Counter
from importlib import import_module
from types import SimpleNamespace

import pytest
import secateur as sc
import torch
from engines import installed
from secateur.exports.executorch import Options
from secateur.runtime.executorch import Engine, instructions
from small_vits import small_vit
from torch import nn

needs_executorch = pytest.mark.skipif(not installed("executorch"), reason="executorch is not installed")
exporter = import_module("secateur.exports.executorch")


@pytest.fixture(autouse=True)
def _one_thread():
    """On a busy machine threads wait for each other."""
    torch.set_num_threads(1)


def loaded(file):
    """The file, loaded as a user would."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runtime = import_module("executorch.runtime").Runtime.get()
    program = runtime.load_program(file)
    return program, program.load_method("forward")


def outputs(file, images):
    program, method = loaded(file)
    (found,) = method.execute((images,))
    del program
    return found


def operators(file):
    """What the file's instructions call, read from the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = import_module("executorch.exir._serialize._program").deserialize_pte_binary
    program = read(file.read_bytes())
    (plan,) = getattr(program, "program", program).execution_plan
    calls = [each.instr_args for chain in plan.chains for each in chain.instructions]
    names = [plan.operators[call.op_index].name for call in calls if hasattr(call, "op_index")]
    return Counter(names), sum(hasattr(call, "delegate_index") for call in calls)


@needs_executorch
def test_batches_and_what_the_report_says(tmp_path):
    model = small_vit()
    report = sc.export(model, tmp_path / "model.pte", format="executorch", max_batch=5)
    assert [file.name for file in tmp_path.iterdir()] == ["model.pte"]
    assert all(block.attn.fused_attn for block in model.blocks)
    assert report.version == (tmp_path / "model.pte").read_bytes()[4:8].decode()
    assert report.batch_sizes == (1, 2, 5)
    outside, delegated = operators(tmp_path / "model.pte")
    assert report.details == {
        "batches": "1 to 5",
        "delegated": delegated,
        "operators_outside": outside.total(),
    }
    # Fused attention would leave these.
    assert not {"aten::where", "aten::logical_not", "aten::any"} & set(outside)
    for batch in (1, 3, 5):
        images = torch.randn(batch, 3, 12, 12)
        with torch.no_grad():
            assert torch.allclose(outputs(tmp_path / "model.pte", images), model(images), rtol=0, atol=1e-5)
    with pytest.raises(RuntimeError):
        outputs(tmp_path / "model.pte", torch.randn(6, 3, 12, 12))


class Parts(nn.Module):
    """Parts of channels by every operator that gives a list, also of sizes that differ."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 7, 3), nn.Linear(7, 4)

    def forward(self, x):
        a, b = self.conv(x).split([2, 5], 1)
        c, d, e = torch.cat([b, a], 1).split(3, 1)
        f, g = torch.cat([e, d, c], 1).chunk(2, 1)
        return self.head(torch.cat([g, f.sigmoid()], 1).mean((2, 3)))


@needs_executorch
def test_what_splits_tensors_takes_batches_of_any_size(tmp_path):
    torch.manual_seed(0)
    model, file = Parts().eval(), tmp_path / "x.pte"
    model.pretrained_cfg = {"input_size": (3, 9, 11)}
    sc.export(model, file, format="executorch", max_batch=6)
    for batch in (1, 4, 6):
        images = torch.randn(batch, 3, 9, 11)
        with torch.no_grad():
            assert torch.allclose(outputs(file, images), model(images), rtol=0, atol=1e-5)


@needs_executorch
def test_single_images_of_a_pruned_model(digits_model, digits_images, tmp_path):
    """Queries of other sizes than values, a narrower stream, and a layer less."""
    ratios = {"qk": 0.4, "v": 0.2, "ffn": 0.3, "width": 0.2, "blocks.1.attn": 1}
    sc.prune(digits_model, sc.plan(digits_model, method="magnitude", ratios=ratios))
    file = tmp_path / "x.pte"
    report = sc.export(digits_model, file, format="executorch", max_batch=1)
    assert (report.batch_sizes, report.details["batches"]) == ((1,), "1")
    assert "aten::sym_size" not in operators(file)[0]
    with torch.no_grad():
        found = torch.cat([outputs(file, image) for image in digits_images[:9].split(1)])
        assert torch.allclose(found, digits_model(digits_images[:9]), rtol=0, atol=1e-4)


@needs_executorch
def test_int8_of_a_trained_model(digits_model, digits_images, tmp_path):
    """Linear layers have weights of 8 bits; the patches' convolution stays as it is."""
    file = tmp_path / "x.pte"
    report = sc.export(
        digits_model, file, format="executorch", int8=True, loader=digits_images.split(20), max_images=30, max_batch=2
    )
    found = torch.cat([outputs(file, image) for image in digits_images[:30].split(1)])
    with torch.no_grad():
        expected = digits_model(digits_images[:30])
    error = float((found - expected).norm() / expected.norm())
    assert 0.001 < error < 0.15
    assert report.details["relative_error"] == pytest.approx(error, rel=0.02)
    agree = float((found.argmax(1) == expected.argmax(1)).double().mean())
    assert report.details["agreement"] == pytest.approx(agree)
    assert (report.details["weights"], report.details["images"]) == ("int8", 30)
    assert report.size < 0.5 * 4 * sum(p.numel() for p in digits_model.parameters())


class Drifting(nn.Module):
    """Computes something else where it is exported: stands for an engine that is wrong."""

    def forward(self, x):
        return x * 1.1 if torch.compiler.is_exporting() else x


@needs_executorch
def test_the_module_that_differs_is_named_and_the_older_file_stays(tmp_path):
    model = small_vit()
    model.blocks[1].mlp.drop1 = Drifting()
    (tmp_path / "x.pte").write_text("older")
    with pytest.raises(sc.Error, match=r"; the first module that differs is blocks\.1\.mlp\.drop1 \(by [0-9.]+\)$"):
        sc.export(model, tmp_path / "x.pte", format="executorch", max_batch=2)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["older"]


def test_the_batches_that_are_compared_by_default():
    for largest, sizes in ((1, (1,)), (2, (1, 2)), (7, (1, 2, 7)), (8, (1, 2, 7, 8)), (32, (1, 2, 7, 32))):
        assert Options(max_batch=largest).batch_sizes == sizes


class Fake:
    """An engine that runs ``run``, or cannot load."""

    version = "9.9"

    def __init__(self, run=None):
        self.run = run

    def load(self, file):
        if self.run is None:
            raise RuntimeError("loading failed with error 0x23\nmore")
        return self.run


def program(*calls):
    """As ExecuTorch holds them: the numbers of operators, or None for a delegate."""
    kernel, delegate = (type(name, (SimpleNamespace,), {}) for name in ("KernelCall", "DelegateCall"))
    made = [SimpleNamespace(instr_args=delegate() if each is None else kernel(op_index=each)) for each in calls]
    plan = SimpleNamespace(
        chains=[SimpleNamespace(instructions=made)],
        operators=[SimpleNamespace(name="aten::slice_copy"), SimpleNamespace(name="aten::expand_copy")],
    )
    return SimpleNamespace(
        executorch_program=SimpleNamespace(execution_plan=[plan]),
        write_to_file=lambda file: file.write(b"\0\0\0\0ET99"),
    )


@pytest.fixture
def faked(monkeypatch):
    """Without ExecuTorch: what it would make, and what it would compute."""

    def fake(run=None, lowered=lambda _: program(None, 0, 1, 1, None)):
        monkeypatch.setattr(exporter, "engine", lambda argument: Fake(run))
        monkeypatch.setattr(exporter, "lowered", lowered)

    return fake


def test_operators_are_counted():
    assert instructions(program(None, 0, 1, 1, None)) == {"delegate": 2, "aten::slice_copy": 1, "aten::expand_copy": 2}


def test_what_an_engine_writes_is_reported(faked, tmp_path):
    model = small_vit()
    faked(lambda images: model(images) + 1e-6)
    report = sc.export(model, tmp_path / "x.pte", format="executorch", max_batch=3)
    assert report.details == {"batches": "1 to 3", "delegated": 2, "operators_outside": 3}
    assert (report.version, report.engine, report.size) == ("ET99", "ExecuTorch 9.9", 8)
    assert 0 < report.difference < 1e-5
    assert [file.name for file in tmp_path.iterdir()] == ["x.pte"]


def raising(_):
    raise RuntimeError("no kernel for aten::x\nmore")


def writing_half(_):
    made = program(None)
    made.write_to_file = lambda file: file.write(b"half") and raising(None)
    return made


def test_no_half_written_file_stays(faked, tmp_path):
    model = small_vit()
    converts = r"^model: expected one that ExecuTorch converts, got no kernel for aten::x$"
    loads = r"^export: expected a file that ExecuTorch loads, got loading failed with error 0x23$"
    made = lambda _: program(None)  # noqa: E731
    for run, lowered, kind, text in (
        (model, raising, sc.Unsupported, converts),
        (model, writing_half, sc.Unsupported, converts),
        (None, made, sc.Error, loads),
        (
            lambda images: model(images) + 1,
            made,
            sc.Error,
            "^export: .* ExecuTorch 9.9 .* a difference of 1 in a batch",
        ),
        (lambda images: raising(images), made, sc.Error, "^export: expected ExecuTorch 9.9 to take a batch of 1, got"),
    ):
        (tmp_path / "x.pte").write_text("older")
        faked(run, lowered)
        with pytest.raises(kind, match=text):
            sc.export(model, tmp_path / "x.pte", format="executorch")
        assert [file.read_text() for file in tmp_path.iterdir()] == ["older"]


def test_what_is_refused(faked, tmp_path):
    model, images = small_vit(), [torch.randn(2, 3, 12, 12)]
    faked(model)
    for net, name, given, text in (
        (model, "x.pt", {}, r"^path: expected a name that ends in \.pte for executorch, got x\.pt$"),
        (model, "x.pte", {"batch_sizes": (2, 9)}, r"^batch_sizes: expected batches of at most 8 \(max_batch\), got 9$"),
        (model, "x.pte", {"max_batch": 0}, "^max_batch: expected an integer of at least 1, got 0$"),
        (model, "x.pte", {"int8": True}, "^loader: expected batches of images to calibrate int8 on, got None$"),
        (model, "x.pte", {"loader": images}, "^loader: expected None without int8, got one$"),
        (small_vit().double(), "x.pte", {}, "^dtype: expected float32 or float16 for executorch, got float64$"),
        (small_vit().half(), "x.pte", {"int8": True, "loader": images}, "^dtype: expected float32 for int8, got f"),
    ):
        with pytest.raises(sc.Error, match=text):
            sc.export(net, tmp_path / name, format="executorch", **given)
    assert not list(tmp_path.iterdir())


CALLS = {
    "format": lambda: sc.export(small_vit(), "x.pte", format="executorch"),
    "runtime": lambda: sc.bench(small_vit(), batch_size=1, runtime="executorch"),
}


@pytest.fixture
def packages(monkeypatch, tmp_path):
    """Put modules in the place of ExecuTorch's; None stands for one that cannot be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(import_module("secateur.runtime.executorch"), "_engines", {})

    def put(**modules):
        for name, members in modules.items():
            full = "executorch" if name == "executorch" else f"executorch.{name}"
            made = None if members is None else types.ModuleType(full)
            if made is not None:
                made.__spec__ = importlib.machinery.ModuleSpec(full, None)
                made.__path__ = []
                made.__dict__.update(members)
            monkeypatch.setitem(sys.modules, full, made)

    return put


@pytest.mark.parametrize("argument", CALLS)
def test_a_missing_executorch_is_named_with_what_installs_it(argument, packages):
    packages(executorch=None)
    with pytest.raises(sc.InvalidArgument) as caught:
        CALLS[argument]()
    assert str(caught.value) == (
        f"{argument}: expected executorch to be installed (pip install 'secateur[executorch]'), got none"
    )


@pytest.mark.parametrize("argument", CALLS)
@pytest.mark.parametrize("version", ["0.7", None])
def test_an_executorch_of_another_torch_and_a_folder_of_its_name(argument, version, packages):
    packages(executorch={}, version=version and {"__version__": f"{version}+cpu"}, runtime=None)
    with pytest.raises(sc.InvalidArgument) as caught:
        CALLS[argument]()
    assert str(caught.value).startswith(
        f"{argument}: expected an ExecuTorch that runs with torch {torch.__version__}, got {version or 'none'} ("
    )


def test_threads_change_only_while_nothing_is_loaded(packages):
    """Programs hold the address of the threads that they were loaded with."""
    kinds = {name: type(name, (), {}) for name in ("ExecuTorchModule", "ExecuTorchProgram", "ExecuTorchMethod")}
    wanted = torch.get_num_threads()
    count = [wanted + 3]
    members = {
        "_threadpool_get_thread_count": lambda: count[0],
        "_unsafe_reset_threadpool": lambda wanted: count.__setitem__(0, wanted),
    }
    runtime = type("Runtime", (), {"get": staticmethod(lambda: None)})
    packages(executorch={}, extension={}, runtime={"Runtime": runtime})
    packages(**{"extension.pybindings": {}, "extension.pybindings.portable_lib": kinds | members})
    late = Engine("9.9")  # others may have loaded programs before
    with pytest.raises(sc.Unsupported, match=f"^threads: expected {wanted + 3}, which ExecuTorch has .* got {wanted}$"):
        late.use_torchs_threads()
    bindings = sys.modules.pop("executorch.extension.pybindings.portable_lib")
    runtime.get = staticmethod(lambda: sys.modules.__setitem__(bindings.__name__, bindings))
    engine = Engine("9.9")
    for name in kinds:
        count[0] = wanted + 3
        alive = kinds[name]()
        with pytest.raises(sc.Unsupported):
            engine.use_torchs_threads()
        assert count == [wanted + 3]
        del alive
        engine.use_torchs_threads()
        assert count == [wanted]
        alive = kinds[name]()
        engine.use_torchs_threads()  # nothing to do
        del alive
