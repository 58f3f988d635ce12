"""Reconstruction: what is minimised, that nothing gets worse on images held back, what stays, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import secateur as sc
import timm
import torch
from models import images, make
from secateur.families.absent import is_absent
from secateur.families.registry import family_of
from secateur.reconstruction.images import HeldBack, batched, shuffled
from secateur.statistics.measurements import Work, measurements
from secateur.statistics.rows import RowWeights
from torch.nn import functional as F  # noqa: N812

HALF = {"qk": 0.5, "v": 0.4, "ffn": 0.5}
KINDS = [
    "plain",
    "no_class_token",
    "no_pool",
    "registers_layer_scale",
    "rms_norm",
    "norm_pre",
    "inner_norms",
    "identity_head",
    "qk_norm",
    "swiglu_packed",
    "gate",
    "distilled",
    "post_norm",
]


def pruned(model, x, ratios=HALF, **more):
    found = copy.deepcopy(model)
    sc.prune(found, sc.plan(found, sc.calibrate(found, [x]), ratios=ratios), **more)
    return found


def values(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def held(x, every):
    return x[every - 1 :: every]


def loss_by_hand(dense, model, x):
    """KL(dense || pruned) in nats, or the squared error of features as a share of their variance."""
    with torch.no_grad():
        wanted, found = dense(x).double(), model(x).double()
    if model.num_classes:
        inputs = (found.log_softmax(-1).flatten(0, -2), wanted.log_softmax(-1).flatten(0, -2))
        return float(F.kl_div(*inputs, reduction="batchmean", log_target=True))
    rows = wanted.flatten(0, -2)
    return float((found - wanted).square().mean() / (rows - rows.mean(0)).square().mean())


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_falls_on_images_held_back(kind):
    """Which are every fifth one, whatever the sizes of batches; the dense model and its mode stay as they are."""
    dense = make(kind).double()
    x = images(dense, 48, 3).double()
    model = pruned(dense, x)
    origin, before = values(dense), loss_by_hand(dense, model, held(x, 5))
    shapes = {name: value.shape for name, value in values(model).items()}
    model.train()
    found = sc.reconstruct(model, dense, list(x.split([7, 30, 11])), epochs=4, output_epochs=2, lr=1e-3, batch_size=9)
    assert model.training
    model.eval()
    assert found.images == 48
    assert found.held_back == 9
    assert found.loss_before == pytest.approx(before, rel=1e-9)
    assert found.loss == pytest.approx(loss_by_hand(dense, model, held(x, 5)), rel=1e-9)
    assert found.loss < 0.99 * before
    assert all(share <= 1 for share in found.blocks.values())
    assert min(found.blocks.values()) < 1
    assert same(values(dense), origin)
    assert {name: value.shape for name, value in values(model).items()} == shapes


@pytest.mark.parametrize("kind", ["plain", "registers_layer_scale", "post_norm", "rms_norm"])
def test_one_step_by_hand(kind):
    """A step of AdamW on each block's squared error, tokens weighted, from what the blocks before it now give."""
    dense = make(kind).double()
    x = images(dense, 12, 5).double()
    model = pruned(dense, x)
    anatomy = sc.inspect(dense)
    work = Work(dense, family_of(dense), anatomy, [x], sc.calibrate(dense, [x], collect="scores"))
    (sums,) = measurements.named("rows").take(work)
    weights = RowWeights(dense, anatomy, dense.num_prefix_tokens, sums)
    chosen = torch.tensor([number for number in range(12) if number % 4 != 3])
    others = torch.tensor([3, 7, 11])

    entering: list[torch.Tensor] = []
    handle = dense.blocks[0].register_forward_pre_hook(lambda _module, args: entering.append(args[0]))
    with torch.no_grad():
        dense(x)
    handle.remove()
    stream = target = entering[0]
    by_hand = copy.deepcopy(model)
    for number, (block, mine) in enumerate(zip(dense.blocks, by_hand.blocks, strict=True)):
        with torch.no_grad():
            target = block(target)
        shares = weights.of(f"blocks.{number}.mlp", target)

        def error(place, block=mine, stream=stream, target=target, shares=shares):
            return (shares[place] * (block(stream[place]) - target[place]).square().sum(-1)).sum(1).mean()

        start = values(mine)
        before = error(others).detach()
        optimizer = torch.optim.AdamW(mine.parameters(), lr=1e-4, weight_decay=0)
        # The norm of its gradient is limited, and divided by the error before.
        (error(chosen) / before).backward()
        torch.nn.utils.clip_grad_norm_(mine.parameters(), 1.0)
        optimizer.step()
        if error(others) >= before:
            mine.load_state_dict(start)
        with torch.no_grad():
            stream = mine(stream)
    settings = {"epochs": 1, "output_epochs": 0, "lr": 1e-4, "batch_size": 50, "held_back": 0.25}
    found = sc.reconstruct(model, dense, [x], **settings)
    assert len(found.blocks) == 2
    assert found.loss < found.loss_before
    wanted = by_hand.state_dict()
    for name, value in model.state_dict().items():
        assert torch.allclose(value, wanted[name], rtol=0, atol=1e-12), name


def test_unlabelled_digits_bring_a_trained_model_closer(digits_model, digits_loader):
    """On others than it saw; blocks and outputs each on their own, then together."""
    batches = [each for each, _ in digits_loader]
    x = torch.cat(batches)
    fit, rest = x[:400], x[400:]
    assert len(rest) >= 100
    model = copy.deepcopy(digits_model)
    sc.prune(model, sc.plan(model, sc.calibrate(model, [fit]), method="snp", target=sc.Target(macs=0.5)))
    before = loss_by_hand(digits_model, model, rest)
    left = {}
    for name, more in (("blocks", {"output_epochs": 0}), ("outputs", {"epochs": 0}), ("both", {})):
        trained = copy.deepcopy(model)
        sc.reconstruct(trained, digits_model, list(fit.split(64)), lr=1e-3, output_lr=3e-4, **more)
        left[name] = loss_by_hand(digits_model, trained, rest) / before
    assert left["blocks"] < 0.5
    assert left["outputs"] < 0.6
    assert left["both"] < 0.4


@pytest.mark.parametrize("kind", ["plain", "fc_norm", "no_class_token"])
def test_a_model_that_merges_tokens_still_does(kind):
    dense = make(kind, img_size=(18, 15)).double()
    x = images(dense, 40, 3).double()
    tokens = sc.inspect(dense).tokens
    sizes = dict.fromkeys(tokens, 0.3)
    model = pruned(dense, x, {**HALF, **sizes})
    macs = sc.inspect(model).macs
    merged = [block.merge for block in model.blocks]
    assert sum(merged) > 0
    found = sc.reconstruct(model, dense, [x], epochs=3, output_epochs=3, lr=1e-3, output_lr=1e-4)
    # Without prefix tokens, the streams of merged tokens say nothing, and 32 images of noise do not bring this far.
    assert found.loss < found.loss_before or kind == "no_class_token"
    assert found.loss <= found.loss_before
    assert sc.inspect(model).macs == macs
    assert [block.merge for block in model.blocks] == merged
    assert found.loss == pytest.approx(loss_by_hand(dense, model, held(x, 5)), rel=1e-9)


def test_a_narrower_stream_is_trained_by_outputs_alone():
    dense = make("plain").double()
    x = images(dense, 40, 3).double()
    model = pruned(dense, x, {**HALF, "width": 0.2})
    found = sc.reconstruct(model, dense, [x], output_epochs=3, output_lr=1e-4)
    assert not found.blocks
    assert found.loss < found.loss_before
    assert len(found.passes) == 4


def test_layers_that_were_removed_stay_so():
    dense = make("plain", depth=3).double()
    x = images(dense, 40, 3).double()
    model = pruned(dense, x, {**HALF, "blocks.1.attn": 1.0, "blocks.2.mlp": 1.0})
    assert is_absent(model.blocks[1].attn)
    found = sc.reconstruct(model, dense, [x], epochs=3, lr=1e-3)
    assert list(found.blocks) == ["blocks.0.mlp", "blocks.1.mlp", "blocks.2.mlp"]
    assert found.loss < found.loss_before
    assert is_absent(model.blocks[1].attn)


def test_blocks_before_the_first_cut_are_not_touched():
    dense = make("plain", depth=3)
    x = images(dense, 40, 3)
    model = pruned(dense, x, {"blocks.1.ffn": 0.5})
    found = sc.reconstruct(model, dense, [x], epochs=2, output_epochs=0, lr=1e-3)
    assert list(found.blocks) == ["blocks.1.mlp", "blocks.2.mlp"]
    assert same(values(model.blocks[0]), values(dense.blocks[0]))
    assert same(values(model.head), values(dense.head))


def test_blocks_are_trained_together():
    dense = make("plain", depth=3)
    x = images(dense, 40, 3)
    model = pruned(dense, x)
    found = sc.reconstruct(model, dense, [x], blocks=2, epochs=2, output_epochs=0, lr=1e-3)
    assert list(found.blocks) == ["blocks.1.mlp", "blocks.2.mlp"]


def test_what_does_not_help_changes_nothing():
    """Steps so large that every pass ends worse, and NaN."""
    dense = make("plain")
    x = images(dense, 40, 3)
    for lr in (30.0, 1e30):
        model = pruned(dense, x)
        before = values(model)
        found = sc.reconstruct(model, dense, [x], epochs=5, output_epochs=5, lr=lr, output_lr=lr)
        assert same(values(model), before)
        assert found.loss == found.loss_before


def test_training_stops_when_it_no_longer_helps():
    """After three passes in vain, not after all."""
    dense = make("plain")
    x = images(dense, 40, 3)
    model = pruned(dense, x)
    found = sc.reconstruct(model, dense, [x], epochs=0, output_epochs=50, output_lr=30.0)
    assert len(found.passes) == 4


def test_streams_that_are_not_kept_give_the_same_bits():
    dense = make("plain")
    x = images(dense, 40, 3)
    trained = []
    for streams in ("memory", "recompute"):
        model = pruned(dense, x)
        sc.reconstruct(model, dense, list(x.split(13)), epochs=2, output_epochs=1, lr=1e-3, streams=streams)
        trained.append(values(model))
    assert same(*trained)


def test_the_same_seed_gives_the_same_bits():
    """And the caller's random numbers stay what they were, also where gradients are off."""
    dense = make("plain", proj_drop_rate=0.5)
    x = images(dense, 40, 3)
    trained = []
    for seed in (3, 3, 4):
        model = pruned(dense, x)
        state = torch.get_rng_state()
        with torch.no_grad():
            sc.reconstruct(model, dense, list(x.split(13)), epochs=2, batch_size=8, lr=1e-3, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        trained.append(values(model))
    assert same(trained[0], trained[1])
    assert not same(trained[0], trained[2])


def test_frozen_parameters_stay():
    dense = make("plain")
    x = images(dense, 40, 3)
    model = pruned(dense, x)
    frozen = [name for name, _ in model.named_parameters() if "norm" in name or name.startswith("head")]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    before = values(model)
    found = sc.reconstruct(model, dense, [x], epochs=2, output_epochs=2, lr=1e-3)
    assert found.loss < found.loss_before
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in frozen)
    assert all(parameter.grad is None for parameter in model.parameters())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    before = values(model)
    assert sc.reconstruct(model, dense, [x], epochs=2).blocks == {}
    assert same(values(model), before)


def test_labels_are_not_read_and_the_limit_holds():
    dense = make("plain")
    x = images(dense, 60, 3)
    trained = []
    for batches in ([x[:40]], [(x[:30], torch.zeros(30)), (x[30:], torch.ones(30))]):
        model = pruned(dense, x)
        sc.reconstruct(model, dense, batches, epochs=2, output_epochs=1, max_images=40)
        trained.append(model(x))
    assert torch.allclose(*trained, atol=1e-5)


def test_refusals():
    """Before anything is changed, each in one line."""
    dense = make("plain")
    x = images(dense, 20, 3)
    model = pruned(dense, x)
    before = values(model)
    cases = [
        ((model, dense, iter([x])), {}, "loader: expected batches that can be read several times, got list_iterator"),
        ((model, model, [x]), {}, "dense: expected another model than the one to train, got the same"),
        ((model, dense, [x[:4]]), {}, "loader: expected at least 5 images, of which one is held back, got 4"),
        ((model, dense, []), {}, "loader: expected at least 5 images, of which one is held back, got 0"),
        ((model, make("plain", num_classes=3), [x]), {}, "dense: expected the model's number of classes, 7, got 3"),
        ((model, make("plain", depth=1), [x]), {}, "dense: expected the model that was pruned, got"),
        (
            (dense, model, [x]),
            {},
            "got a ReducedVisionTransformer for a VisionTransformer, which is smaller in blocks.0.qk",
        ),
        ((model, make("plain").double(), [x]), {}, "dense: expected the model's type, float32, got float64"),
        (
            (model, make("plain", img_size=(12, 18)), [x]),
            {},
            "dense: expected the model's input size, (3, 12, 15), got",
        ),
        ((copy.deepcopy(model).half(), copy.deepcopy(dense).half(), [x]), {}, "expected weights in float32 or"),
        ((model, dense, [x]), {"held_back": 0.6}, "held_back: expected"),
        ((model, dense, [x]), {"held_back": 0}, "held_back: expected"),
        ((model, dense, [x]), {"blocks": 0}, "blocks: expected"),
        ((model, dense, [x]), {"lr": 0}, "lr: expected"),
        ((model, dense, [x]), {"streams": "disk"}, "streams: expected 'memory' or 'recompute', got 'disk'"),
        ((model, dense, [x]), {"epochs": -1}, "epochs: expected"),
    ]
    for arguments, more, text in cases:
        with pytest.raises(sc.InvalidArgument) as error:
            sc.reconstruct(*arguments, **more)
        assert text in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(sc.NumericalError, match=r"loader: expected finite values, got nan in image 19"):
        sc.reconstruct(model, dense, [torch.cat([x[:-1], x[-1:] * torch.nan])])
    assert same(values(model), before)


def test_images_that_change_from_pass_to_pass_are_refused():
    dense = make("plain")
    x = images(dense, 40, 3)
    model = pruned(dense, x)
    before = values(model)

    class Shuffled:
        def __iter__(self):
            yield x[torch.randperm(40)]

    with pytest.raises(sc.InvalidArgument, match=r"^loader: expected the same images in the same order in each pass"):
        sc.reconstruct(model, dense, Shuffled(), epochs=1, output_epochs=1)
    assert same(values(model), before)


def test_what_changed_before_the_first_layer_is_seen():
    """The mean of a removed first layer goes into the embedding; so does what an earlier run has trained."""
    dense = make("plain")
    x = images(dense, 40, 3)
    removed, trained = pruned(dense, x, {"blocks.0.attn": 1.0}), pruned(dense, x, {"blocks.1.ffn": 0.5})
    first = sc.reconstruct(trained, dense, [x], epochs=0, output_epochs=2, output_lr=1e-5)
    assert first.loss < first.loss_before
    assert not torch.equal(trained.pos_embed, dense.pos_embed)
    for model in (removed, trained):
        found = []
        for streams in ("memory", "recompute"):
            again = copy.deepcopy(model)
            done = sc.reconstruct(again, dense, [x], epochs=3, output_epochs=0, lr=1e-4, streams=streams)
            found.append(values(again))
        assert same(*found)
    done = sc.reconstruct(removed, dense, [x], epochs=3, output_epochs=0, lr=1e-4)
    assert next(iter(done.blocks)) == "blocks.0.mlp"
    assert done.images == 40


def test_streams_before_the_first_cut_do_not_rule_the_outputs():
    """Their error is zero at first: as a share of that, any step would be infinitely bad."""
    dense = make("plain", depth=3).double()
    x = images(dense, 40, 3).double()
    model = pruned(dense, x, {"blocks.2.ffn": 0.8, "blocks.2.qk": 0.5})
    found = sc.reconstruct(model, dense, [x], epochs=0, output_epochs=10, output_lr=1e-4)
    assert found.loss < 0.95 * found.loss_before


def test_models_without_single_layers_are_refused():
    resnet = timm.create_model("resnet18", num_classes=3)
    with pytest.raises(sc.Unsupported, match=r"whose layers run one at a time, got ResNet \(finetune with a teacher"):
        sc.reconstruct(copy.deepcopy(resnet), resnet, [torch.zeros(5, 3, 32, 32)])


def test_images_are_held_back_evenly():
    for share, every in ((0.5, 2), (0.2, 5), (0.01, 100)):
        held_back = HeldBack(share)
        numbers = [number for number in range(1000) if held_back.holds(number)]
        assert numbers == list(range(every - 1, 1000, every))
        assert all(held_back.count(n) == sum(number < n for number in numbers) for n in range(0, 1000, 7))


def test_the_order_is_a_permutation_that_reaches_as_far_as_the_buffer():
    generator = torch.Generator().manual_seed(1)
    found = list(shuffled(iter(range(1000)), 100, generator))
    assert sorted(found) == list(range(1000))
    assert all(number < place + 100 for place, number in enumerate(found))
    # Drawn evenly: what comes first lies in the middle of the first hundred, on average.
    first = [next(shuffled(range(1000), 100, generator)) for _ in range(1000)]
    assert sum(first) / 1000 == pytest.approx(49.5, abs=3)
    assert [len(batch) for batch in batched(range(7), 3)] == [3, 3, 1]
