"""CUDA devices: the way through torch, forced on the CPU; and, where there is a device, the core's kernels on it."""

from __future__ import annotations

import numpy as np
import pytest
import secateur as sc
import timm
import torch
from dlpack import FakeTensor
from models import images, make
from secateur import core, errors
from secateur.core import fallback
from secateur.families.vision_transformer.modules import PrunedAttention
from secateur.statistics.observer import Observer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
with_kernels = pytest.mark.skipif(
    not (torch.cuda.is_available() and core.runtime.has_cuda()), reason="needs a CUDA device and a core built with CUDA"
)
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.fixture
def through_torch(monkeypatch):
    """Every tensor is one that the core does not read and torch can multiply where it is."""
    used = []
    monkeypatch.setattr(fallback, "_core_reads", lambda x, head_dim=1: False)
    monkeypatch.setattr(fallback, "_torch_multiplies", lambda x: not used.append(tuple(x.shape)))
    return used


def within(found, expected, tolerance):
    """Relative to the largest of an array, as sums of products are."""
    for name, array in expected.tensors.items():
        np.testing.assert_allclose(
            found.tensors[name], array, rtol=0, atol=tolerance * max(np.abs(array).max(), 1), err_msg=name
        )


@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_through_torch_a_trained_model_has_the_same_statistics(digits_model, digits_images, through_torch, fraction):
    """In float64, where the core multiplies in float64 as well; the samples are float32."""
    model, x = digits_model.double(), digits_images[:12].double()
    found = sc.calibrate(model, [x[:5], x[5:]], token_fraction=fraction)
    assert through_torch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fallback, "_core_reads", lambda x, head_dim=1: True)
        expected = sc.calibrate(model, [x[:5], x[5:]], token_fraction=fraction)
    assert found.tensors.keys() == expected.tensors.keys()
    within(found, expected, 1e-9)


@pytest.mark.parametrize("kind", ["plain", "qk_norm", "qk_rms_norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_through_torch_scores_are_the_same_for_every_dtype(through_torch, kind, dtype):
    model = make(kind).to(dtype)
    x = images(model, 5).to(dtype)
    found = sc.calibrate(model, [x])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fallback, "_core_reads", lambda x, head_dim=1: True)
        expected = sc.calibrate(model, [x])
    scores = [name for name in expected.tensors if name.endswith("score_sum")]
    assert scores
    for name in scores:
        np.testing.assert_allclose(found.tensors[name], expected.tensors[name], rtol=0, atol=1e-9, err_msg=name)
    within(found, expected, 1e-5)  # the core's float32 products


class MergeOnly:
    """An accumulator that rows do not come to: NaN on the way would send them there."""

    def __init__(self, accumulator):
        self.name, self.merge = accumulator.name, accumulator.merge


@pytest.mark.parametrize("norm", ["none", "rms", "layer"])
@pytest.mark.parametrize(("stride", "phase"), [(1, 0), (3, 0), (4, 7)])
def test_through_torch_rows_are_the_cores(through_torch, monkeypatch, norm, stride, phase):
    monkeypatch.setattr(fallback, "_CHUNK_BYTES", 500)  # several chunks, the last one shorter
    x = torch.randn(5, 11, 6, dtype=torch.float64).transpose(0, 1)
    x[2, 3] = 7  # a constant row, of which a LayerNorm leaves nothing
    x[4, 1] = 0
    found, expected = core.MomentAccumulator(6), core.MomentAccumulator(6)
    fallback.update_moments([MergeOnly(found)], x, norm=norm, stride=stride, phases=[phase])
    expected.update(x, norm=norm, stride=stride, phase=phase)
    assert found.rows == expected.rows > 0
    np.testing.assert_allclose(found.sum(), expected.sum(), rtol=0, atol=1e-11)
    np.testing.assert_allclose(found.second_moment(), expected.second_moment(), rtol=0, atol=1e-11)


def test_through_torch_faults_are_named_as_ever(through_torch):
    q = torch.randn(2, 7, 2, 5)
    bad = q.clone()
    bad[1, 2, 0, 3] = float("nan")
    scorer = core.AttentionScorer(2, 5, name="blocks.0.attn")
    with pytest.raises(errors.NumericalError, match=r"^blocks\.0\.attn k: expected finite values, got nan at \("):
        fallback.update_scores([scorer], q, bad)
    assert scorer.images == 0
    rows = core.MomentAccumulator(5, name="fc2")
    with pytest.raises(errors.NumericalError, match=r"^fc2 x: expected finite values, got nan"):
        fallback.update_moments([rows], bad, phases=[0])
    assert rows.rows == 0


def test_through_torch_under_autocast(digits_model, digits_images, through_torch):
    with torch.autocast("cpu", torch.bfloat16):
        found = sc.calibrate(digits_model, [digits_images[:6]])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fallback, "_core_reads", lambda x, head_dim=1: True)
            expected = sc.calibrate(digits_model, [digits_images[:6]])
    scores = [name for name in expected.tensors if name.endswith("score_sum")]
    assert scores
    for name in scores:
        np.testing.assert_allclose(found.tensors[name], expected.tensors[name], rtol=0, atol=1e-9, err_msg=name)
    within(found, expected, 1e-5)


def test_through_torch_values_beyond_its_products_are_the_cores(through_torch):
    """Grams of 1e200 do not fit into float64; the core scales first."""
    q, k = (torch.randn(1, 9, 2, 5, dtype=torch.float64) * 1e200 for _ in range(2))
    found, expected = core.AttentionScorer(2, 5), core.AttentionScorer(2, 5)
    fallback.update_scores([found], q, k)
    expected.update(q, k)
    np.testing.assert_array_equal(found.scores(), expected.scores())
    rows = torch.tensor([[1.0, 1e121]], dtype=torch.float64)
    with pytest.raises(errors.NumericalError, match=r"^x: expected magnitudes up to 1e120, got 1e\+121$"):
        fallback.update_moments([core.MomentAccumulator(2)], rows, phases=[0])


def test_what_the_core_reads_by_itself(monkeypatch):
    class Elsewhere:
        device = torch.device("cuda", 0)

    assert fallback._core_reads(torch.ones(1), 4096)
    for built in (False, True):
        monkeypatch.setattr(core.runtime, "has_cuda", staticmethod(lambda built=built: built))
        assert fallback._core_reads(Elsewhere(), 128) is built
        assert not fallback._core_reads(Elsewhere(), 129)
    assert fallback._torch_multiplies(Elsewhere())
    assert not fallback._torch_multiplies(torch.ones(1))


def test_a_device_that_the_core_refuses_is_torchs(monkeypatch):
    q, k = torch.randn(2, 9, 1, 4), torch.randn(2, 9, 1, 4)
    expected = core.AttentionScorer(1, 4)
    expected.update(q, k)

    def refuse(scorers, q, k, *, wait):
        raise errors.Unsupported("cuda:0: expected a device that this build has code for")

    found = core.AttentionScorer(1, 4)
    monkeypatch.setattr(core.AttentionScorer, "update_in_turn", staticmethod(refuse))
    with pytest.raises(errors.Unsupported, match=r"^cuda:0: "):
        fallback.update_scores([found], q, k)
    monkeypatch.setattr(fallback, "_torch_multiplies", lambda x: True)
    fallback.update_scores([found], q, k)
    np.testing.assert_allclose(found.scores(), expected.scores(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("again", [False, True])
def test_memory_that_torch_keeps_free_is_the_cores_too(monkeypatch, again):
    """torch's allocator keeps what it has freed, which nobody else can have."""
    done = []

    def update(*_, **__):
        done.append("update")
        if again or "emptied" not in done:
            raise errors.Error("memory: expected 8 bytes on cuda:0, got none (0 of 80 bytes are free)")

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("emptied"))
    monkeypatch.setattr(core.MomentAccumulator, "update_in_turn", update)
    accumulators = [core.MomentAccumulator(3)]
    x = torch.zeros(1, 2, 3)
    with pytest.raises(errors.Error, match="memory: expected 8 bytes"):
        fallback.update_moments(accumulators, x, phases=[0])
    assert done == ["update"]  # of the host there is no other
    done.clear()
    monkeypatch.setattr(fallback, "_torch_multiplies", lambda x: True)
    if again:
        with pytest.raises(errors.Error, match="memory: expected 8 bytes"):
            fallback.update_moments(accumulators, x, phases=[0])
    else:
        fallback.update_moments(accumulators, x, phases=[0])
    assert done == ["update", "emptied", "update"]


def test_a_batch_that_nobody_waited_for_runs_again_for_the_error(monkeypatch):
    """As on a device: what is wrong comes out at the end of the batch, and does not say where it is."""
    model, left = make("plain"), []
    with torch.no_grad():
        model.blocks[1].attn.qkv.bias[3] = float("inf")

    def later(scorers, q, k, *, wait, update=fallback.update_scores):
        try:
            update(scorers, q, k)
        except errors.NumericalError as error:
            if wait:
                raise
            left.append(error)

    def wait(self):
        if left:
            left.clear()
            raise errors.NumericalError("q: expected finite values, got one that is not")

    monkeypatch.setattr(fallback, "update_scores", later)
    monkeypatch.setattr(Observer, "wait", wait)
    with pytest.raises(errors.NumericalError, match=r"^blocks\.1\.attn q: expected finite values, got inf at \("):
        sc.calibrate(model, [images(model, 3)], collect="scores")


class Streamed(FakeTensor):
    """A CUDA tensor of a framework without torch's interface, which notes what it is asked."""

    def __dlpack_device__(self):
        return (2, 1)

    def __dlpack__(self, **options):
        self.options = options
        return super().__dlpack__()


def test_other_frameworks_are_asked_for_the_default_stream():
    tensor = Streamed(device=2)
    with pytest.raises(errors.Error, match=r"^x: expected .*cuda:1"):
        core.MomentAccumulator(2).update(tensor)
    assert tensor.options == {"max_version": (1, 0), "stream": 1}
    assert tensor.deleted == 1


@pytest.mark.skipif(core.runtime.has_cuda(), reason="a core without CUDA")
def test_a_core_without_cuda_says_so():
    for call, argument in (
        (core.MomentAccumulator(2).update, "x"),
        (lambda x: core.compact(x, 0, [0]), "tensor"),
        (lambda x: core.AttentionScorer(1, 2).update(x, x), "q"),
    ):
        text = rf"^{argument}: expected a tensor on the CPU \(this build has no CUDA\), got one on cuda:1$"
        with pytest.raises(errors.Unsupported, match=text):
            call(FakeTensor(device=2))


@with_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "dim"), [(197, 64), (20, 31), (3, 7), (50, 128), (257, 80)])
def test_scores_on_a_device(dtype, tokens, dim):
    qkv = torch.randn(3, tokens, 3, 2, dim).to(dtype)
    qkv[:, :, 1] += 3
    expected = core.AttentionScorer(2, dim, moments=True)
    expected.update(qkv[:, :, 0], qkv[:, :, 1])
    found = core.AttentionScorer(2, dim, moments=True)
    there = qkv.cuda()
    found.update(there[:1, :, 0], there[:1, :, 1])
    found.update(there[1:, :, 0], there[1:, :, 1])
    np.testing.assert_allclose(found.scores(), expected.scores(), rtol=0, atol=1e-7)
    np.testing.assert_allclose(found.score_gram(), expected.score_gram(), rtol=1e-9, atol=1e-6)
    whole = core.AttentionScorer(2, dim, moments=True)
    whole.update(there[:, :, 0], there[:, :, 1])
    for name, array in whole.state().items():
        np.testing.assert_array_equal(array, found.state()[name], err_msg=name)


@with_kernels
def test_faults_on_a_device():
    q = torch.randn(2, 7, 2, 5, device="cuda")
    bad = q.clone()
    bad[1, 2, 0, 3] = float("inf")
    scorer = core.AttentionScorer(2, 5)
    with pytest.raises(errors.NumericalError, match=r"^k: expected finite values, got inf at \(image 1, token 2, "):
        scorer.update(q, bad)
    with pytest.raises(errors.InvalidArgument, match=r"^k: expected the device of q, cuda:0, got cpu$"):
        scorer.update(q, q.cpu())
    assert scorer.images == 0
    large = core.AttentionScorer(1, 129)
    with pytest.raises(errors.Unsupported, match=r"^head_dim: expected at most 128 on CUDA, got 129$"):
        large.update(torch.ones(1, 2, 1, 129, device="cuda"), torch.ones(1, 2, 1, 129, device="cuda"))


@with_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["none", "rms", "layer"])
def test_moments_on_a_device(dtype, norm):
    x = (0.5 + torch.randn(30, 197, 96)).to(dtype)
    found, expected = core.MomentAccumulator(96), core.MomentAccumulator(96)
    found.update(x.cuda(), norm=norm, stride=3, phase=2)
    expected.update(x, norm=norm, stride=3, phase=2)
    assert found.rows == expected.rows
    np.testing.assert_allclose(found.sum(), expected.sum(), rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(found.second_moment(), expected.second_moment(), rtol=1e-5, atol=1e-3)


@on_cuda
def test_what_is_not_finite_is_named_on_a_device():
    model = make("plain").cuda()
    with torch.no_grad():
        model.blocks[1].attn.qkv.bias[3] = float("inf")
    with pytest.raises(errors.NumericalError, match=r"^blocks\.1\.attn q: expected finite values, got inf at \("):
        sc.calibrate(model, [images(model, 3).cuda()])


@with_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("strided", [False, True])
def test_compact_on_a_device(dtype, dim, strided):
    """On a stream of its own, behind work that is still under way there."""
    host = torch.randn(40, 50, 60).to(dtype)
    keep = [1, 2, 7, 8, 30, 39]
    with torch.cuda.stream(torch.cuda.Stream()):
        tensor = host.cuda(non_blocking=True)
        if strided:
            tensor = tensor.transpose(0, 2).contiguous().transpose(0, 2)
        shape, strides = core.compact(tensor, dim, keep)
        found = tensor.as_strided(shape, strides).clone()
        torch.cuda.current_stream().synchronize()
    torch.testing.assert_close(found.cpu(), host.index_select(dim, torch.tensor(keep)), rtol=0, atol=0)


class CopiesToHost(TorchDispatchMode):
    """Sizes of the tensors that torch copies from a device to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sources = [each for each in args if isinstance(each, torch.Tensor) and each.is_cuda]
        if sources and isinstance(result, torch.Tensor) and not result.is_cuda:
            self.found.append(tuple(sources[0].shape))
        return result


@on_cuda
def test_statistics_and_cuts_on_a_device(digits_model, digits_images):
    expected = sc.calibrate(digits_model, [digits_images])
    model = digits_model.cuda()
    found = sc.calibrate(model, [digits_images.cuda()])
    for name in (name for name in expected.tensors if name.endswith("score_sum")):
        np.testing.assert_allclose(found.tensors[name], expected.tensors[name], rtol=0, atol=0.05 * 64)
    plan = sc.plan(model, found, ratios={"qk": 0.5, "v": 0.25, "ffn": 0.5})
    with CopiesToHost() as copies:
        sc.prune(model, plan, strict=False)
    assert copies.found == []
    assert all(parameter.is_cuda for parameter in model.parameters())
    assert model(digits_images.cuda()).isfinite().all()


SIZES = [(23, 64), (22, 64), (9, 16), (64, 23), (16, 21), (8, 6), (13, 13), (20, 12), (16, 24), (32, 8)]
HEADS, WIDTH = 3, 96


def odd_attention(qk_dim, v_dim):
    attention = timm.layers.Attention(WIDTH, num_heads=HEADS)
    PrunedAttention.adopt(attention, qk_dim, v_dim, attention.q_norm, attention.k_norm)
    attention.qkv = torch.nn.Linear(WIDTH, HEADS * (2 * qk_dim + v_dim))
    attention.proj = torch.nn.Linear(HEADS * v_dim, WIDTH)
    return attention


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("qk_dim", "v_dim"), SIZES)
def test_rows_for_fused_kernels_begin_at_16_bytes(monkeypatch, dtype, qk_dim, v_dim):
    """Wherever in the fused buffer they were; on a device that need not be there, in tensors without data."""
    seen = []

    def fused(q, k, v, **_):
        seen.extend([q, k, v])
        return v.new_empty(*q.shape[:3], v.shape[-1])

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fused)
    with FakeTensorMode(), torch.device("cuda"):
        attention = odd_attention(qk_dim, v_dim)
        for linear in (attention.qkv, attention.proj):
            for name, parameter in list(linear.named_parameters()):
                setattr(linear, name, torch.nn.Parameter(parameter.detach().to(dtype)))
        attention.fused_attn = True
        y = attention(torch.empty(2, 65, WIDTH, dtype=dtype))
    assert (y.shape, y.device.type, y.dtype) == ((2, 65, WIDTH), "cuda", dtype)
    step = 16 // dtype.itemsize
    assert len({tensor.shape for tensor in seen}) == 1
    for tensor in seen:
        assert tensor.storage_offset() % step == 0
        assert all(stride % step == 0 for stride in tensor.stride()[:-1]), tensor.stride()
        assert tensor.stride(-1) == 1


@pytest.mark.parametrize(("qk_dim", "v_dim"), SIZES)
def test_gradients_of_fused_kernels_lie_token_by_token(monkeypatch, qk_dim, v_dim):
    """With padding as without: torch's key to cuDNN's plans does not say how gradients lie."""
    seen = []

    def fused(q, k, v, **_):
        y = (q + k + v) * 1  # of any layout: the gradient's is that of what uses it
        y.register_hook(lambda gradient: seen.append((gradient.shape, gradient.stride())))
        return y

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fused)
    attention = odd_attention(qk_dim, v_dim)
    attention.fused_attn = True
    attention(torch.ones(2, 65, WIDTH)).square().sum().backward()
    ((shape, strides),) = seen
    size = shape[-1]
    assert shape == (2, HEADS, 65, size)
    assert strides == (65 * HEADS * size, size, HEADS * size, 1)


def assert_fused_is_unfused(qk_dim, v_dim, dtype, images, tokens):
    """Outputs and gradients, on the device."""
    attention = odd_attention(qk_dim, v_dim).to("cuda", dtype)
    x = torch.randn(images, tokens, WIDTH, device="cuda", dtype=dtype)
    weight = torch.randn(images, tokens, WIDTH, device="cuda", dtype=dtype)
    parts = []
    for fused in (True, False):
        attention.fused_attn = fused
        attention.zero_grad()
        y = attention(x)
        (y * weight).sum().backward()
        gradients = attention.qkv.weight.grad.split([HEADS * qk_dim, HEADS * qk_dim, HEADS * v_dim])
        parts.append([y.detach(), *(each.clone() for each in gradients)])
    bar = 1e-4 if dtype == torch.float32 else 2e-2
    for ours, expected in zip(*parts, strict=True):
        assert (ours - expected).abs().max() <= bar * expected.abs().max()


@on_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("qk_dim", "v_dim"), SIZES)
def test_fused_attention_of_odd_sizes(dtype, qk_dim, v_dim):
    assert_fused_is_unfused(qk_dim, v_dim, dtype, 2, 65)


@on_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [[(9, 16), (13, 13)], [(13, 11), (9, 16)], [(23, 64), (64, 23)]])
def test_fused_attention_of_sizes_that_are_padded_to_one(dtype, sizes):
    """The second takes the plans that cuDNN made for the first; no other test has so many tokens."""
    for qk_dim, v_dim in sizes:
        assert_fused_is_unfused(qk_dim, v_dim, dtype, 3, 30 + len(sizes) + sizes[0][0])
