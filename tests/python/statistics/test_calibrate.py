"""Statistics against literal float64 references, and the promises of calibrate."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import secateur as sc
import timm
import torch
from models import images, make
from scores import mean_scores, queries_and_keys
from secateur.calibration.calibrate import calibrate_block
from small_vits import small_batches, small_vit
from sums import assert_close
from torch import nn


def assert_scores(model, x, gamma):
    stats = sc.calibrate(model, [x], gamma=gamma, collect="scores")
    for block, (q, k) in enumerate(queries_and_keys(model, x)):
        expected = mean_scores(q, k, gamma)
        np.testing.assert_allclose(stats.importance(f"blocks.{block}.qk"), expected, rtol=0, atol=1e-5)
        assert np.abs(stats.importance(f"blocks.{block}.qk") - expected).max() <= 1e-3 * expected.std()


@pytest.mark.parametrize("gamma", [1, 8, 40])
def test_scores_of_a_trained_model(digits_model, digits_images, gamma):
    assert_scores(digits_model, digits_images[:12], gamma)


@pytest.mark.parametrize("kind", ["plain", "qk_norm", "qk_rms_norm", "registers_layer_scale", "distilled", "gate"])
def test_scores_of_random_models(kind):
    """After query/key norms where there are any."""
    model = make(kind)
    assert_scores(model, images(model, 5), 8)


def test_scores_of_a_pruned_model(digits_model, digits_images):
    """Uneven query/key and value sizes: calibrated again, the columns are still told apart."""
    stats = sc.calibrate(digits_model, [digits_images])
    sc.prune(digits_model, sc.plan(digits_model, stats, method="snp", ratios={"qk": 0.6, "v": 0.3}))
    again = sc.calibrate(digits_model, [digits_images])
    attn = digits_model.blocks[0].attn
    with torch.no_grad():
        x = digits_model.blocks[0].norm1(digits_model._pos_embed(digits_model.patch_embed(digits_images)))
        q, k, v = attn.qkv(x).split([3 * attn.qk_dim, 3 * attn.qk_dim, 3 * attn.v_dim], dim=-1)
    expected = mean_scores(q.unflatten(-1, (3, -1)), k.unflatten(-1, (3, -1)), 8)
    np.testing.assert_allclose(again.importance("blocks.0.qk"), expected, atol=1e-5)
    moments = again.moments("blocks.0.v")
    flat = v.double().flatten(0, 1)
    np.testing.assert_allclose(moments.second, (flat.T @ flat / len(flat)).numpy(), rtol=1e-4, atol=1e-5)


@pytest.fixture
def observed(digits_model, digits_images):
    """Every tensor that is observed in block 1, in float64, read by plain hooks."""
    model, seen = digits_model.double(), {}
    block = model.blocks[1]
    hooks = [
        block.attn.proj.register_forward_pre_hook(lambda m, a: seen.update(proj=a[0])),
        block.mlp.fc2.register_forward_pre_hook(lambda m, a: seen.update(hidden=a[0])),
        block.attn.qkv.register_forward_hook(lambda m, a, o: seen.update(v=o[..., 186:])),
    ]
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    stream = {}
    hooks += [
        norm.register_forward_pre_hook(lambda m, a, name=name: stream.update({name: a[0]}))
        for name, norm in norms.items()
    ]
    x = digits_images[:10].double()
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return model, x, {**seen, "stream": stream}


def moments_of(x):
    x = x.flatten(0, -2)
    return x.mean(0).numpy(), (x.T @ x / len(x)).numpy()


def test_moments(observed):
    model, x, seen = observed
    stats = sc.calibrate(model, [x[:3], x[3:]])
    for group, what in (("blocks.1.v", "v"), ("blocks.1.attn.proj", "proj"), ("blocks.1.ffn", "hidden")):
        moments = stats.moments(group)
        mean, second = moments_of(seen[what])
        assert moments.rows == 10 * 65
        np.testing.assert_allclose(moments.mean, mean, atol=1e-12)
        np.testing.assert_allclose(moments.second, second, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(moments.covariance, second - np.outer(mean, mean), atol=1e-10)
    assert len(seen["stream"]) == 7
    for name, y in seen["stream"].items():
        centred = y - y.mean(-1, keepdim=True)
        unit = centred / centred.norm(dim=-1, keepdim=True) * 93**0.5
        mean, second = moments_of(unit)
        np.testing.assert_allclose(stats.moments(name).mean, mean, atol=1e-10)
        np.testing.assert_allclose(stats.moments(name).second, second, rtol=1e-9, atol=1e-10)


def test_grams(observed, digits_images):
    model, x, _ = observed
    stats = sc.calibrate(model, [x])
    q, k = (t.transpose(1, 2) for t in queries_and_keys(model, x)[2])
    kc = k - k.mean(2, keepdim=True)
    gq, gk = q.mT @ q, kc.mT @ kc
    np.testing.assert_allclose(stats.gram("blocks.2.qk", "query_gram"), gq.sum(0).numpy(), rtol=1e-10, atol=1e-9)
    np.testing.assert_allclose(stats.gram("blocks.2.qk", "key_gram"), gk.sum(0).numpy(), rtol=1e-10, atol=1e-9)
    expected = (gq * gk).sum(0).numpy()
    np.testing.assert_allclose(stats.gram("blocks.2.qk", "score_gram"), expected, rtol=1e-9, atol=1e-9 * expected.max())


def test_folds_are_even_and_odd_images(digits_model, digits_images):
    whole = sc.calibrate(digits_model, [digits_images[:5], digits_images[5:11]], gamma=4)
    even = sc.calibrate(digits_model, [digits_images[:11:2]], gamma=4)
    assert whole.images_by_fold == (6, 5)
    for name in ("blocks.0.qk", "blocks.2.qk"):
        np.testing.assert_allclose(whole.importance(name, "even"), even.importance(name), rtol=1e-4)
    np.testing.assert_allclose(
        whole.moments("blocks.1.ffn", "even").second, even.moments("blocks.1.ffn").second, rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.25, 0.1])
def test_results_do_not_depend_on_how_images_are_batched(digits_model, digits_images, fraction):
    model, x = digits_model.double(), digits_images[:22].double()
    whole = sc.calibrate(model, [x], token_fraction=fraction)
    split = sc.calibrate(model, x.split([1, 4, 2, 7, 8]), token_fraction=fraction)
    assert whole.tensors.keys() == split.tensors.keys()
    for name, array in whole.tensors.items():
        np.testing.assert_allclose(array, split.tensors[name], rtol=1e-9, atol=1e-9 * np.abs(array).max(), err_msg=name)


@pytest.mark.parametrize("fraction", [0.5, 0.25])
def test_token_fraction_rotates_over_all_positions_in_both_folds(digits_model, digits_images, fraction):
    stride = round(1 / fraction)
    x = digits_images[:1].expand(4 * stride, -1, -1, -1)
    part = sc.calibrate(digits_model, [x], token_fraction=fraction)
    whole = sc.calibrate(digits_model, [digits_images[:1].expand(2, -1, -1, -1)])
    for fold in ("even", "odd"):
        # 2 rounds of all tokens of the same image in each fold.
        assert part.moments("blocks.0.ffn", fold).rows == 2 * 65
        np.testing.assert_allclose(
            part.moments("blocks.0.ffn", fold).second, whole.moments("blocks.0.ffn").second, rtol=1e-4, atol=1e-5
        )
    assert part.importance("blocks.0.qk") == pytest.approx(whole.importance("blocks.0.qk"), abs=1e-6)


def test_scores_only_collects_no_moments(digits_model, digits_images):
    stats = sc.calibrate(digits_model, [digits_images], collect="scores")
    assert {name.split("/")[2] for name in stats.tensors} == {"images", "tokens", "score_sum"}
    with pytest.raises(sc.InvalidArgument, match="group: expected rows of 'blocks.0.ffn'"):
        stats.moments("blocks.0.ffn")


class Counting:
    """A loader that counts what is asked of it."""

    def __init__(self, batches):
        self.batches, self.given = batches, 0

    def __iter__(self):
        for batch in self.batches:
            self.given += 1
            yield batch


@pytest.mark.parametrize("limit", [1, 7, 16, 17, 64, 100, None])
def test_max_images_is_exact_and_reads_no_further(digits_model, digits_images, limit):
    loader = Counting([(batch, torch.zeros(len(batch))) for batch in digits_images.split(16)])
    stats = sc.calibrate(digits_model, loader, max_images=limit, collect="scores")
    expected = min(64, limit or 64)
    assert stats.images == expected
    assert loader.given == -(-expected // 16)


def fingerprint(model):
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [(module.training, len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()],
        [(p.requires_grad, p.grad, id(p)) for p in model.parameters()],
    )


@pytest.mark.parametrize("broken", [False, True])
def test_the_model_is_left_as_it_was(digits_model, digits_images, broken):
    digits_model.train()
    digits_model.blocks[1].eval()
    digits_model.norm.weight.requires_grad_(False)
    state, modules, parameters = fingerprint(digits_model)
    generator = torch.get_rng_state()
    batches = [digits_images[:8]]
    if broken:
        with pytest.raises(RuntimeError, match="the disk is gone"):
            sc.calibrate(digits_model, raising(batches))
    else:
        sc.calibrate(digits_model, batches)
    after_state, after_modules, after_parameters = fingerprint(digits_model)
    assert after_modules == modules
    assert after_parameters == parameters
    assert all(torch.equal(after_state[name], value) for name, value in state.items())
    assert torch.equal(torch.get_rng_state(), generator)


def raising(batches):
    yield from batches
    raise RuntimeError("the disk is gone")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_image_is_refused_and_what_was_collected_stays(digits_model, digits_images, value, tmp_path):
    bad = digits_images[:4].clone()
    bad[2, 1, 5, 5] = value
    path = tmp_path / "stats.safetensors"
    with pytest.raises(sc.NumericalError, match=f"loader: expected finite values, got {value} in image 10"):
        sc.calibrate(digits_model, [digits_images[:8], bad], resume=path)
    kept, clean = sc.Statistics.load(path), sc.calibrate(digits_model, [digits_images[:8]])
    assert kept.settings == clean.settings
    assert all(np.array_equal(array, kept.tensors[name]) for name, array in clean.tensors.items())


@pytest.mark.parametrize(("collect", "layer"), [("scores", r"blocks\.1\.attn q"), ("all", r"blocks\.1\.norm1 x")])
def test_a_bad_layer_is_named_and_half_a_batch_is_not_kept(digits_model, digits_images, collect, layer, tmp_path):
    path = tmp_path / "stats.safetensors"
    sc.calibrate(digits_model, [digits_images[:8]], collect=collect, resume=path)
    before = path.read_bytes()
    nan = float("nan")
    handle = digits_model.blocks[0].register_forward_hook(lambda _m, _a, y: y.index_fill(0, torch.tensor([2]), nan))
    with pytest.raises(sc.NumericalError, match=layer + ": expected finite values"):
        sc.calibrate(digits_model, [digits_images[:16]], collect=collect, resume=path)
    handle.remove()
    assert path.read_bytes() == before
    assert sc.calibrate(digits_model, [digits_images[:16]], collect=collect, resume=path).images == 16


def test_an_interrupted_run_keeps_what_it_has(digits_model, digits_images, tmp_path):
    path = tmp_path / "stats.safetensors"
    with pytest.raises(RuntimeError, match="the disk is gone"):
        sc.calibrate(digits_model, raising(digits_images.split(16)), resume=path)
    assert sc.Statistics.load(path).images == 64


def test_resume_is_as_exact_as_a_run_in_one_go(digits_model, digits_images, tmp_path):
    path = tmp_path / "stats.safetensors"
    batches = digits_images.split(8)
    assert sc.calibrate(digits_model, batches, max_images=13, resume=path).images == 13
    assert sc.calibrate(digits_model, batches, max_images=21, resume=path).images == 21
    with pytest.raises(sc.InvalidArgument, match="resume: expected a file of at most 20 images, got 21"):
        sc.calibrate(digits_model, batches, max_images=20, resume=path)
    with pytest.raises(sc.InvalidArgument, match="resume: expected a loader of at least 21 images, got 5 fewer"):
        sc.calibrate(digits_model, batches[:2], resume=path)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(sc.InvalidArgument, match="keys of float32, got bfloat16"),
    ):
        sc.calibrate(digits_model, batches, resume=path)
    assert sc.Statistics.load(path).images == 21


def test_the_cores_threads_are_put_back(digits_model, digits_images):
    before = sc.core.runtime.threads()
    sc.core.runtime.set_threads(3)
    stats = sc.calibrate(digits_model, [digits_images])
    sc.plan(digits_model, stats, method="snp", ratios={"qk": 0.5})
    assert sc.core.runtime.threads() == 3
    sc.core.runtime.set_threads(before)


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "loader: expected floating-point images, got torch.uint8"),
        (torch.zeros(3, 32, 32), r"loader: expected .* got a tensor of shape \(3, 32, 32\)"),
        ("image.png", "loader: expected .* got str"),
    ],
)
def test_batches_that_are_no_images(digits_model, batch, text):
    with pytest.raises(sc.InvalidArgument, match=text):
        sc.calibrate(digits_model, [batch])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"max_images": 0}, "max_images: expected an integer of at least 1, got 0"),
        ({"gamma": 0}, "gamma: expected an integer of at least 1, got 0"),
        ({"gamma": 2.5}, "gamma: expected an integer of at least 1, got 2.5"),
        ({"token_fraction": "x"}, "token_fraction: expected a fraction in"),
        ({"resume": "no_folder/stats"}, "resume: expected a file in an existing folder, got no_folder/stats"),
        ({"resume": "/"}, "resume: expected a file in an existing folder, got /"),
        ({"collect": "most"}, "collect: expected 'scores' or 'all', got 'most'"),
        ({"token_fraction": 0.0}, r"token_fraction: expected a fraction in \(0, 1\], got 0.0"),
        ({"checkpoint_every": 2}, "checkpoint_every: expected resume= to name the file"),
    ],
)
def test_wrong_arguments(digits_model, digits_images, arguments, text):
    with pytest.raises(sc.InvalidArgument, match=text):
        sc.calibrate(digits_model, [digits_images], **arguments)
    with pytest.raises(sc.InvalidArgument, match="loader: expected at least one image, got none"):
        sc.calibrate(digits_model, [])
    with pytest.raises(sc.InvalidArgument, match="loader: expected batches of images, got int"):
        sc.calibrate(digits_model, 5)
    with pytest.raises(sc.InvalidArgument, match="loader: expected batches of images .*, got NoneType"):
        sc.calibrate(digits_model, [digits_images, None, digits_images])
    with pytest.raises(sc.InvalidArgument, match=r"loader: expected images \(B, 3, 32, 32\), got \(2, 3, 20, 20\)"):
        sc.calibrate(digits_model, [torch.zeros(2, 3, 20, 20)])


def test_a_warning_once_when_images_are_not_normalised():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3)
    raw = torch.rand(3, 3, 32, 32)
    right = (raw - 0.5) / 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sc.calibrate(model, [right, right])
    for wrong in (raw, raw * 255):
        with pytest.warns(UserWarning, match="calibration images range over") as caught:
            sc.calibrate(model, [wrong, wrong])
        assert len(caught) == 1


def test_resume_after_an_interruption(digits_model, digits_images, tmp_path):
    batches = digits_images.split(9)
    path = tmp_path / "stats.safetensors"
    with pytest.raises(RuntimeError, match="the disk is gone"):
        sc.calibrate(digits_model, raising(batches[:5]), resume=path, checkpoint_every=2)
    assert sc.Statistics.load(path).images == 45
    resumed = sc.calibrate(digits_model, batches, resume=path, checkpoint_every=2)
    whole = sc.calibrate(digits_model, batches)
    assert resumed.settings == whole.settings
    for name, array in whole.tensors.items():
        assert np.array_equal(array, resumed.tensors[name]), name
    again = sc.calibrate(digits_model, batches, resume=path)
    assert again.images == 64
    assert [entry.name for entry in tmp_path.iterdir()] == ["stats.safetensors"]


def test_resume_refuses_another_calibration(digits_model, digits_images, tmp_path):
    path = tmp_path / "stats.safetensors"
    sc.calibrate(digits_model, [digits_images], resume=path, gamma=3)
    with pytest.raises(sc.InvalidArgument, match="resume: expected a file of gamma = 8, got 3"):
        sc.calibrate(digits_model, [digits_images], resume=path)
    with torch.no_grad():
        digits_model.blocks[2].mlp.fc1.weight[5, 5] += 1
    with pytest.raises(sc.InvalidArgument, match=r"other weights of blocks\.2\.mlp\.fc1\.weight"):
        sc.calibrate(digits_model, [digits_images], resume=path, gamma=3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_other_dtypes(digits_model, digits_images, dtype):
    stats = sc.calibrate(digits_model.to(dtype), [digits_images[:4].float()])
    assert stats.settings.dtype == str(dtype).removeprefix("torch.")
    q, k = queries_and_keys(digits_model, digits_images[:4].to(dtype))[0]
    np.testing.assert_allclose(stats.importance("blocks.0.qk"), mean_scores(q, k, 8), atol=1e-5)


def watched(model, x):
    """What block 1 and all norms of the stream see in one forward pass, read by plain hooks, as float64."""
    seen, stream = {}, {}
    block = model.blocks[1]
    hooks = [
        block.attn.proj.register_forward_pre_hook(lambda m, a: seen.update({"blocks.1.attn.proj": a[0].double()})),
        block.mlp.fc2.register_forward_pre_hook(lambda m, a: seen.update({"blocks.1.ffn": a[0].double()})),
        block.attn.qkv.register_forward_hook(
            lambda m, a, o: seen.update({"blocks.1.v": o.double()[..., 2 * block.attn.attn_dim :]})
        ),
    ]
    hooks += [
        norm.register_forward_pre_hook(lambda m, a, name=name: stream.update({name: a[0].double()}))
        for name, norm in model.named_modules()
        if isinstance(norm, nn.LayerNorm) and norm.normalized_shape == (model.embed_dim,)
    ]
    qk = [(q.double(), k.double()) for q, k in queries_and_keys(model, x)]
    for hook in hooks:
        hook.remove()
    for name, y in stream.items():
        centred = y - y.mean(-1, keepdim=True)
        seen[name] = centred / centred.norm(dim=-1, keepdim=True) * model.embed_dim**0.5
    return qk, seen


def errors(stats, qk, seen):
    """Of the importance, as a share of its spread over neurons, and of everything else in the Frobenius norm."""
    scores, sums = [], []
    for block, (q, k) in enumerate(qk):
        expected = mean_scores(q, k, 8)
        scores.append(np.abs(stats.importance(f"blocks.{block}.qk") - expected).max() / expected.std())
        q, k = q.transpose(1, 2), (k - k.mean(1, keepdim=True)).transpose(1, 2)
        gq, gk = q.mT @ q, k.mT @ k
        for which, gram in (("query_gram", gq), ("key_gram", gk), ("score_gram", gq * gk)):
            sums.append((stats.gram(f"blocks.{block}.qk", which), gram.sum(0).numpy()))
    for name, x in seen.items():
        mean, second = moments_of(x)
        sums += [(stats.moments(name).mean, mean), (stats.moments(name).second, second)]
    return max(scores), max(np.linalg.norm(found - right) / np.linalg.norm(right) for found, right in sums)


@pytest.fixture(params=["digits", "plain", "no_class_token", "qk_norm", "hybrid"])
def model_and_images(request):
    """The trained model, and random ones of odd sizes."""
    if request.param == "digits":
        return request.getfixturevalue("digits_model"), request.getfixturevalue("digits_images")[:13]
    model = make(request.param)
    return model, images(model, 13)


def test_under_autocast(model_and_images):
    """Exact sums of what the model computes; next to float64, the few roundings of bfloat16 before each layer."""
    model, x = model_and_images
    with torch.autocast("cpu", torch.bfloat16):
        stats = sc.calibrate(model, [x[:4], x[4:]])
        in_bfloat16 = watched(model, x)
    assert stats.settings.dtype == "bfloat16"
    scores, sums = errors(stats, *in_bfloat16)
    assert scores <= 1e-9
    assert sums <= 1e-6
    scores, sums = errors(stats, *watched(model.double(), x.double()))
    # bfloat16 rounds by up to 2**-9. A hybrid has a whole ResNet of such roundings before its first block.
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert 2**-10 <= sums <= 4 * 2**-8
    assert scores <= (0.05 if convolutions == 1 else 0.2)


def test_channels_last(model_and_images):
    """Model and images in another memory format: the same statistics to float32 accuracy, and the same identity."""
    model, x = model_and_images
    plain = sc.calibrate(model, [x])
    model.to(memory_format=torch.channels_last)
    stats = sc.calibrate(model, [y.to(memory_format=torch.channels_last) for y in (x[:4], x[4:])])
    assert model.patch_embed.proj.weight.is_contiguous(memory_format=torch.channels_last)
    assert stats.settings == plain.settings
    assert sc.Statistics.merge([plain, stats]).images == 26
    expected = watched(model.double(), x.double())
    for found in (plain, stats):
        scores, sums = errors(found, *expected)
        assert sums <= 2e-6
        assert scores <= 2e-5


def test_a_model_without_weights_is_refused():
    model = timm.create_model("vit_tiny_patch16_224", device="meta", depth=1)
    with pytest.raises(sc.InvalidArgument, match="model: expected weights, got none in"):
        sc.calibrate(model, [torch.zeros(1, 3, 224, 224)])


@pytest.mark.parametrize("shape", [(12, 15), (3, 3)])
def test_one_image_and_few_tokens(shape):
    """Fewer tokens than neurons, down to two: a class token and one patch."""
    model = make("plain")
    model.set_input_size(shape)
    x = images(model, 1)
    stats = sc.calibrate(model, [x])
    q, k = queries_and_keys(model, x)[0]
    np.testing.assert_allclose(stats.importance("blocks.0.qk"), mean_scores(q, k, 8), atol=1e-5)
    sc.prune(model, sc.plan(model, stats, method="snp", ratios={"qk": 0.5, "v": 0.5, "ffn": 0.5, "width": 0.5}))
    assert model(x).shape == (1, 7)


@pytest.mark.parametrize("labels", [["a"] * 16, {"y": 1}, torch.tensor(3), torch.zeros(5)])
def test_calibrate_does_not_look_at_labels(labels):
    model = small_vit()
    images = torch.cat(small_batches())
    found = sc.calibrate(model, [(images, labels)])
    wanted = sc.calibrate(model, [images])
    assert np.array_equal(found.importance("blocks.0.qk"), wanted.importance("blocks.0.qk"))
    with pytest.raises(sc.InvalidArgument, match="loader: expected"):
        sc.evaluate(model, [(images, labels)])


def test_images_are_counted_where_only_some_layers_have_several_maps_per_image():
    """Swin's last stage is often one window: the maps of the earlier ones are not images."""
    torch.manual_seed(3)
    model = timm.models.swin_transformer.SwinTransformer(
        img_size=(28, 28), patch_size=2, embed_dim=12, depths=(1, 1), num_heads=(2, 3), window_size=7, num_classes=3
    ).eval()
    maps = [layer.taps["query"].maps_per_image for layer in sc.inspect(model).attention]
    assert maps == [4, 1]
    x = torch.randn(5, 3, 28, 28)
    stats = sc.calibrate(model, [x[:2], x[2:]])
    assert (stats.images, stats.images_by_fold) == (5, (3, 2))
    for block in (*range(len(maps)), None):
        assert calibrate_block(model, [x], block, max_images=None, token_fraction=1.0).images == 5


def test_a_resumed_calibration_counts_images_and_not_maps(tmp_path):
    torch.manual_seed(4)
    model = timm.models.swin_transformer.SwinTransformer(
        img_size=(28, 28), patch_size=2, embed_dim=12, depths=(1, 1), num_heads=(2, 3), window_size=7, num_classes=3
    ).eval()
    x = torch.randn(5, 3, 28, 28)
    path = tmp_path / "half.safetensors"
    sc.calibrate(model, [x[:2]], resume=path)
    stats = sc.calibrate(model, [x[:2], x[2:]], resume=path)
    assert_close(sc.calibrate(model, [x[:2], x[2:]]), stats, tolerance=1e-12)


def test_gradients_of_heads_where_there_are_none():
    """A model without attention has no heads to score, and calibration says nothing of any."""
    model = timm.create_model("test_resnet", num_classes=4).eval()
    stats = sc.calibrate(model, [torch.rand(2, 3, 64, 64) * 2 - 1], head_gradients=True)
    assert stats.images == 2
    assert not any(name.endswith("/gradient") for name in stats.tensors)
