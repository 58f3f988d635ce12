"""Gradients of calibration against literal forms: gradients of weights, and of factors that multiply units."""

from __future__ import annotations

import numpy as np
import pytest
import secateur as sc
import torch
from models import images, make
from small_vits import small_batches, small_vit
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

KINDS = ["plain", "registers_layer_scale", "qk_norm", "inner_norms", "swiglu_packed", "swiglu_split", "gate", "fc_norm"]


def own(model, output):
    if isinstance(model.head, nn.Identity):
        return output.square().sum() / 2
    return functional.cross_entropy(output, output.argmax(-1), reduction="sum")


def rows_squared(model, weights, loss):
    """(Σ w · ∂L/∂w)² of each row of these layers, its bias included."""
    parameters = [p for layer in weights for p in (layer.weight, layer.bias) if p is not None]
    found = dict(zip(map(id, parameters), torch.autograd.grad(loss, parameters, retain_graph=True), strict=True))
    rows = []
    for layer in weights:
        total = (layer.weight * found[id(layer.weight)]).flatten(1).sum(1)
        rows.append((total if layer.bias is None else total + layer.bias * found[id(layer.bias)]).square().detach())
    return rows


def taylor(model, image):
    """The terms of one image, by group, for timm's own modules."""
    loss = own(model, model(image[None]))
    found, width = {}, rows_squared(model, [model.patch_embed.proj], loss)[0]
    for index, block in enumerate(model.blocks):
        heads = block.attn.num_heads
        names = [name for name in ("fc1", "fc1_g", "fc1_x") if hasattr(block.mlp, name)]
        layers = [block.attn.qkv, block.attn.proj, block.mlp.fc2, *(getattr(block.mlp, name) for name in names)]
        qkv, proj, fc2, *hidden = rows_squared(model, layers, loss)
        q, k, v = qkv.view(3, heads, -1)
        found[f"blocks.{index}.qk"], found[f"blocks.{index}.v"] = q + k, v
        found[f"blocks.{index}.ffn"] = sum(each.view(-1, block.mlp.fc2.in_features).sum(0) for each in hidden)[None]
        width = width + proj + fc2
    return found | {"width": width[None]}


def multiplied(module, factor, at="input"):
    if at == "input":
        return module.register_forward_pre_hook(lambda _m, args: (args[0] * factor, *args[1:]))
    return module.register_forward_hook(lambda _m, _args, out: out * factor)


def factors(model, image):
    """∂L/∂m of one image for factors m = 1 at the inputs of all that reads a unit, by group."""
    ones, handles = {}, []

    def one(name, *shape):
        ones[name] = torch.ones(shape, dtype=torch.float64, requires_grad=True)
        return ones[name]

    width = one("width", 1, model.embed_dim)
    for index, block in enumerate(model.blocks):
        attn, mlp, name = block.attn, block.mlp, f"blocks.{index}"
        heads, dim = attn.num_heads, attn.head_dim
        readers = [attn.qkv, *(getattr(mlp, each) for each in ("fc1", "fc1_g", "fc1_x") if hasattr(mlp, each))]
        readers += [attn.gate] if getattr(attn, "gate", None) is not None else []
        handles += [multiplied(module, width[0]) for module in readers]
        handles.append(multiplied(attn.q_norm, one(f"{name}.qk", heads, dim)[:, None], "output"))
        whole, values = one(f"{name}.heads", 1, heads), one(f"{name}.v", heads, dim)
        handles.append(multiplied(attn.proj, (whole[0, :, None] * values).flatten()))
        handles.append(multiplied(mlp.fc2, one(f"{name}.ffn", 1, mlp.fc2.in_features)[0]))
    if isinstance(model.head, nn.Linear):
        handles.append(multiplied(model.head, width[0]))
    loss = own(model, model(image[None]))
    found = torch.autograd.grad(loss, list(ones.values()))
    for handle in handles:
        handle.remove()
    return dict(zip(ones, found, strict=True))


def mean(terms):
    return {name: torch.stack([each[name] for each in terms]).mean(0).numpy() for name in terms[0]}


@pytest.mark.parametrize("kind", ["digits", *KINDS, "identity_head"])
def test_they_are_those_of_weights_and_of_factors(kind, request):
    if kind == "digits":
        model, x = request.getfixturevalue("digits_model"), request.getfixturevalue("digits_images")[:19]
    else:
        model = make(kind)
        x = images(model, 19)
    model, x = model.double(), x.double()
    squares, derivatives = mean([taylor(model, each) for each in x]), [factors(model, each) for each in x]
    fisher = mean([{name: each.square() for name, each in found.items()} for found in derivatives])
    gate = mean([{name: each.abs() for name, each in found.items()} for found in derivatives])
    for frozen in (False, True):
        model.requires_grad_(not frozen)
        stats = sc.calibrate(model, [x[:18], x[18:]], collect="scores", gradients=True)
        assert all(parameter.grad is None for parameter in model.parameters())
        assert stats.settings.gradients == "own answers"
        for name, expected in squares.items():
            np.testing.assert_allclose(
                stats.gradients(name, "taylor"), expected, rtol=1e-8, atol=1e-12 * expected.max()
            )
        for name, expected in fisher.items():
            np.testing.assert_allclose(
                stats.gradients(name, "fisher"), expected, rtol=1e-8, atol=1e-12 * expected.max()
            )
            if name.endswith("heads"):
                np.testing.assert_allclose(stats.head_importance(name), gate[name][0], rtol=1e-8)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_035"])
def test_filters_of_traced_models(name):
    """Factors on what the readers of a group take, and gradients of the writers' weights."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).double().eval()
    x = torch.rand(3, *sc.inspect(model).input_size, dtype=torch.float64) * 4 - 2
    stats = sc.calibrate(model, [x], gradients=True)
    chosen = [group for group in sc.inspect(model).groups if group.kind == "conv"][:2]
    chosen += [group for group in sc.inspect(model).groups if group.kind == "width"][:1]
    for group in chosen:
        squares, weights = [], []
        for image in x:
            factor = torch.ones(group.size, dtype=torch.float64, requires_grad=True)
            handles = []
            for member in group.of("reader"):
                module = model.get_submodule(member.module)
                of_unit = torch.zeros(module.weight.shape[1], dtype=torch.int64)
                of_unit[member.entries[0, :, 0]] = torch.arange(group.size)
                scale = factor[of_unit]
                handles.append(multiplied(module, scale[:, None, None] if module.weight.ndim == 4 else scale))
            loss = own_of(model(image[None]))
            squares.append(torch.autograd.grad(loss, factor, retain_graph=True)[0].square())
            for handle in handles:
                handle.remove()
            writers = [model.get_submodule(member.module) for member in group.of("writer")]
            own_rows = rows_squared(model, writers, loss)
            order = [torch.as_tensor(member.entries[0, :, 0]) for member in group.of("writer")]
            weights.append(sum(rows[places] for rows, places in zip(own_rows, order, strict=True)))
        for what, terms in (("fisher", squares), ("taylor", weights)):
            expected = torch.stack(terms).mean(0).numpy()
            found = stats.gradients(group.name, what)[0]
            np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-10 * expected.max())


def own_of(output):
    return functional.cross_entropy(output, output.argmax(-1), reduction="sum")


def labelled(count=16, classes=5):
    generator = torch.Generator().manual_seed(3)
    x = torch.cat(small_batches(count))
    return x, torch.randint(classes, (count,), generator=generator)


def same(stats, others, rtol=1e-12):
    assert stats.tensors.keys() == others.tensors.keys()
    for name, sums in stats.tensors.items():
        if name.endswith(("taylor", "fisher", "gate")):
            np.testing.assert_allclose(others.tensors[name], sums, rtol=rtol, atol=rtol * abs(sums).max())


@pytest.mark.parametrize("form", ["pairs", "mapping", "list"])
def test_any_batching_and_form_gives_the_same_sums(form):
    """The mean loss of a batch is scaled by its size; the last part of a batch, and what max_images leaves, count."""
    model = small_vit().double()
    x, y = labelled(40)
    x = x.double()
    whole = sc.calibrate(model, [(x[:37], y[:37])], gradients=True, loss="labels")

    def batch(part):
        if form == "pairs":
            return x[part], y[part]
        if form == "mapping":
            return {"pixel_values": x[part], "labels": y[part]}
        return [x[part], y[part]]

    def loss(outputs, batch):
        held = batch["labels"] if form == "mapping" else batch[1]
        assert len(held) == len(outputs) <= 16
        return functional.cross_entropy(outputs, held)

    parts = [slice(0, 2), slice(2, 23), slice(23, 40)]
    found = sc.calibrate(model, [batch(part) for part in parts], max_images=37, gradients=True, loss=loss)
    same(whole, found)
    assert "loss" in found.settings.gradients
    assert not np.allclose(
        sc.calibrate(model, [x[:37]], gradients=True).gradients("width", "fisher"), whole.gradients("width", "fisher")
    )


def test_stopped_and_continued_gives_the_bits_of_one_run(tmp_path):
    model = small_vit().double()
    x = torch.cat(small_batches(24)).double()
    whole = sc.calibrate(model, [x[:9], x[9:18], x[18:]], gradients=True)
    path = tmp_path / "stats.safetensors"
    sc.calibrate(model, [x[:9]], gradients=True, resume=path)
    found = sc.calibrate(model, [x[:9], x[9:18], x[18:]], gradients=True, resume=path)
    loaded = sc.Statistics.load(path)
    for name, sums in whole.tensors.items():
        assert np.array_equal(found.tensors[name], sums)
        assert np.array_equal(loaded.tensors[name], sums)
    part = [sc.calibrate(model, [each], gradients=True) for each in (x[:8], x[8:])]
    same(whole, sc.Statistics.merge(part))
    labels = {"gradients": True, "loss": "labels", "resume": path}
    with pytest.raises(
        sc.InvalidArgument, match="^resume: expected a file of gradients = 'labels', got 'own answers'$"
    ):
        sc.calibrate(model, [(x, torch.zeros(24, dtype=torch.int64))], **labels)
    with pytest.raises(sc.InvalidArgument, match="^resume: expected a file of gradients = '', got 'own answers'$"):
        sc.calibrate(model, [x], resume=path)
    with pytest.raises(sc.InvalidArgument, match="^parts: expected gradients = 'own answers' in all, got ''$"):
        sc.Statistics.merge([part[0], sc.calibrate(model, [x])])


def batches_of(x, y, form):
    """Two images and what belongs to them, in a form that could be taken for another."""
    arrays = {
        "loader": DataLoader(TensorDataset(x, y), batch_size=2),
        "array": [(x[:2].numpy(), y[:2]), (x[2:].numpy(), y[2:])],
        "named": [({"pixel_values": x[:2]}, y[:2]), ({"pixel_values": x[2:]}, y[2:])],
    }
    return arrays[form]


@pytest.mark.parametrize("form", ["loader", "array", "named"])
@pytest.mark.parametrize(
    "loss", ["labels", lambda out, batch: functional.cross_entropy(out, torch.as_tensor(batch[1]))]
)
def test_two_images_are_no_two_columns(form, loss):
    """Collated tensors were made in inference mode, which autograd cannot save."""
    model = small_vit().double()
    x, y = labelled(4)
    stats = sc.calibrate(model, batches_of(x.double(), y, form), gradients=True, loss=loss)
    terms = []
    for image, label in zip(x.double(), y, strict=True):
        loss_of = functional.cross_entropy(model(image[None]), label[None])
        terms.append(rows_squared(model, [model.patch_embed.proj, model.blocks[1].mlp.fc1], loss_of)[1])
    np.testing.assert_allclose(stats.gradients("blocks.1.ffn", "taylor")[0], torch.stack(terms).mean(0), rtol=1e-8)


def test_what_a_loss_gets_of_a_batch():
    """Of a part of the batch all that belongs to its images, and nothing else."""
    model, seen = small_vit(), []
    x, y = labelled(18)

    def loss(out, batch):
        seen.append(batch)
        return functional.cross_entropy(out, batch[1])

    boxes = [{"box": torch.full((each % 3, 4), float(each))} for each in range(18)]
    sc.calibrate(model, [(x, y, boxes, (y, x[:, 0]), "day")], gradients=True, loss=loss)
    assert [len(each[0]) for each in seen] == [1, 16, 2]
    images, labels, found, (again, channel), word = seen[-1]
    assert torch.equal(images, x[16:])
    assert torch.equal(labels, y[16:])
    assert [float(each["box"].sum()) for each in found] == [16 * 4, 17 * 4 * 2]
    assert torch.equal(again, y[16:])
    assert torch.equal(channel, x[16:, 0])
    assert word == "day"


def test_images_that_are_counted_are_not_looked_at_again(tmp_path):
    model = small_vit()
    x = torch.cat(small_batches(12))
    sc.calibrate(model, [x[:6]], gradients=True, resume=tmp_path / "x.stats")
    gone = torch.full_like(x[:6], torch.nan)
    found = sc.calibrate(model, [torch.cat([gone, x[6:9]]), x[9:]], gradients=True, resume=tmp_path / "x.stats")
    same(found, sc.calibrate(model, [x], gradients=True), rtol=1e-5)


def test_the_loss_is_computed_under_autocast():
    """Where cross-entropy is of float32."""
    seen = []

    def loss(out, _batch):
        seen.append(functional.cross_entropy(out, out.argmax(1)))
        return seen[-1]

    sc.calibrate(small_vit(), small_batches(4), gradients=True, loss=loss, amp="bfloat16")
    assert {each.dtype for each in seen} == {torch.float32}


def test_autocast_changes_little():
    model = small_vit()
    x = torch.cat(small_batches(32))
    plain = sc.calibrate(model, [x], gradients=True)
    half = sc.calibrate(model, [x], gradients=True, amp="bfloat16")
    assert half.settings.gradients == "own answers, bfloat16"
    first, second = (each.gradients("blocks.1.ffn", "taylor")[0] for each in (plain, half))
    assert not np.array_equal(first, second)
    assert np.corrcoef(first, second)[0, 1] > 0.99


@pytest.mark.parametrize("inplace", [False, True])
def test_activations_in_place_change_nothing(inplace):
    model = small_vit(act_layer=lambda: nn.ReLU(inplace=inplace)).double()
    x = torch.cat(small_batches(8)).double()
    stats = sc.calibrate(model, [x], gradients=True)
    for block in model.blocks:
        block.mlp.act = nn.ReLU()
    expected = mean([taylor(model, each) for each in x])
    np.testing.assert_allclose(stats.gradients("blocks.0.ffn", "taylor"), expected["blocks.0.ffn"], rtol=1e-8)


def broken(_outputs, _batch):
    raise KeyError("boxes")


BAD = [
    ({"gradients": False, "loss": "labels"}, "loss: expected None without gradients=True, got 'labels'"),
    ({"gradients": False, "amp": "bfloat16"}, "amp: expected None without gradients=True, got 'bfloat16'"),
    ({"loss": "mse"}, "loss: expected a function of (outputs, batch), 'labels' or None, got 'mse'"),
    ({"amp": "float16"}, "amp: expected 'bfloat16' or None, got 'float16'"),
    ({"loss": "labels"}, "loader: expected (images, targets) for loss='labels', got images alone"),
    ({"loss": lambda o, _: o}, "loss: expected a scalar tensor, the mean over the batch, got shape (1, 5)"),
    (
        {"loss": lambda o, _: float(o.detach().sum())},
        "loss: expected a scalar tensor, the mean over the batch, got float",
    ),
    ({"loss": lambda o, _: o.detach().sum()}, "loss: expected a scalar with a gradient, got one without"),
    ({"loss": broken}, "loss: expected a function of (outputs, batch), got KeyError: 'boxes'"),
]


@pytest.mark.parametrize(("arguments", "text"), BAD)
def test_what_cannot_be_differentiated_is_refused_before_any_work(arguments, text, tmp_path):
    model = small_vit()
    seen = []
    model.register_forward_hook(lambda _m, args, _out: seen.append(len(args[0])))
    path = tmp_path / "stats.safetensors"
    with pytest.raises(sc.InvalidArgument) as error:
        sc.calibrate(model, small_batches(), resume=path, sensitivity=True, **{"gradients": True, **arguments})
    assert str(error.value) == text
    assert sum(seen) <= 1
    assert not path.exists()


def test_labels_out_of_range_are_refused():
    model = small_vit()
    x, _ = labelled(4)
    with pytest.raises(
        sc.InvalidArgument, match=r"^loss: expected outputs \(B, classes\) and targets below the number"
    ):
        sc.calibrate(model, [(x, torch.full((4,), 5))], gradients=True, loss="labels")


def test_gradients_that_are_not_finite_are_named():
    model = small_vit()
    x, _ = labelled(4)
    with pytest.raises(sc.NumericalError, match=r"^blocks\.0\.qk: expected finite gradients, got NaN or Inf$"):
        sc.calibrate(model, [x], gradients=True, loss=lambda out, _: out.sum() * float("inf"))


def test_methods_say_what_is_missing():
    model = small_vit()
    stats = sc.calibrate(model, small_batches())
    text = r"^stats: expected gradients for 'taylor', calibrate\(gradients=True\), got statistics without$"
    with pytest.raises(sc.InvalidArgument, match=text):
        sc.plan(model, stats, method="taylor", ratios={"qk": 0.5})
    text = "^methods: expected some that need no gradients, got 'taylor'; use gradients=True$"
    with pytest.raises(sc.InvalidArgument, match=text):
        sc.calibrate(model, small_batches(), sensitivity=True, methods=["taylor"])
    with pytest.raises(
        sc.InvalidArgument, match="^method: expected one that takes no gradients block by block, got 'ta"
    ):
        sc.prune_sequential(model, small_batches(), method="taylor", ratios={"ffn": 0.5})
