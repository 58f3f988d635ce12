"""The bindings: the core's surface from Python, against float64 references in NumPy."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import subprocess
import sys
import threading
import time
import weakref
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from dlpack import FakeTensor
from scores import mean_scores
from secateur import _core as core
from secateur import errors

EXTENSION = Path(core.__file__)
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def literal_similarity(rows):
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = rows / np.where(norms > 0, norms, 1)
    distances = 1 - np.abs(unit @ unit.T)
    np.fill_diagonal(distances, 0)
    return np.where(norms[:, 0] > 0, distances.sum(1), 0)


def unpack(packed, dim):
    full = np.zeros((*packed.shape[:-1], dim, dim))
    rows, columns = np.triu_indices(dim)
    full[..., rows, columns] = packed
    full[..., columns, rows] = packed
    return full


def batch(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Exporter:
    """An array that has nothing but DLPack's methods, like another framework's."""

    def __init__(self, array, requires_grad=False):
        self.array = array
        if requires_grad:
            self.requires_grad = True

    def detach(self):
        return Exporter(self.array)

    def __dlpack__(self, **keywords):
        if getattr(self, "requires_grad", False):
            message = "detach first"
            raise BufferError(message)
        return self.array.__dlpack__(**keywords)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class OldExporter(Exporter):
    """Of before DLPack 1: no max_version."""

    def __dlpack__(self):
        return self.array.__dlpack__()


# --- scores and moments ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1000])
def test_scores_are_the_literal_svds(dtype, offset):
    q, k = (batch(3, 40, 2, 24, seed=seed).add(offset).to(dtype) for seed in (1, 2))
    scorer = core.AttentionScorer(heads=2, head_dim=24)
    scorer.update(q, k)
    expected = mean_scores(q, k, 8)
    np.testing.assert_allclose(scorer.scores(), expected, atol=1e-9)
    assert scorer.scores().dtype == np.float64
    assert scorer.images == 3


@pytest.mark.parametrize(("tokens", "dim", "gamma"), [(1, 5, 8), (7, 16, 3), (30, 33, 40), (197, 64, 16)])
def test_scores_of_odd_shapes(tokens, dim, gamma):
    q, k = batch(2, tokens, 3, dim, seed=3), batch(2, tokens, 3, dim, seed=4)
    scorer = core.AttentionScorer(3, dim, gamma)
    scorer.update(q, k)
    np.testing.assert_allclose(scorer.scores(), mean_scores(q, k, gamma), atol=1e-9)


def test_strided_views_of_a_fused_qkv():
    """The view that timm's attention makes: (B, N, 3·H·d) to (3, B, H, N, d), then back to tokens first."""
    qkv = batch(2, 20, 3 * 4 * 8, dtype=torch.float32).requires_grad_()
    q, k, _ = qkv.reshape(2, 20, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
    scorer, plain, numpy = (core.AttentionScorer(4, 8) for _ in range(3))
    scorer.update(q.transpose(1, 2), k.transpose(1, 2))
    q, k = (x.detach().transpose(1, 2) for x in (q, k))
    plain.update(q.contiguous(), k.contiguous())
    numpy.update(q.numpy(), k.numpy())
    np.testing.assert_array_equal(scorer.scores(), plain.scores())
    np.testing.assert_array_equal(scorer.scores(), numpy.scores())


def test_moments_are_sums_of_grams():
    q, k = batch(3, 21, 2, 10, seed=5), batch(3, 21, 2, 10, seed=6).add(1000)
    scorer = core.AttentionScorer(2, 10, moments=True)
    scorer.update(q.numpy(), k.numpy())
    centred = k - k.mean(1, keepdim=True)
    grams_q = torch.einsum("bnhi,bnhj->bhij", q, q)
    grams_k = torch.einsum("bnhi,bnhj->bhij", centred, centred)
    np.testing.assert_allclose(scorer.query_gram(), grams_q.sum(0), atol=1e-11)
    np.testing.assert_allclose(scorer.key_gram(), grams_k.sum(0), atol=1e-9)
    np.testing.assert_allclose(scorer.score_gram(), (grams_q * grams_k).sum(0), atol=1e-8)


def test_scorer_properties_and_repr():
    scorer = core.AttentionScorer(2, 10, 5, moments=True, name="blocks.0.attn")
    assert (scorer.heads, scorer.head_dim, scorer.gamma, scorer.moments) == (2, 10, 5, True)
    assert scorer.name == "blocks.0.attn"
    assert repr(scorer) == (
        "AttentionScorer(heads=2, head_dim=10, gamma=5, moments=True, name='blocks.0.attn'): 0 images"
    )
    accumulator = core.MomentAccumulator(7, name="fc1")
    assert (accumulator.dim, accumulator.name, accumulator.rows) == (7, "fc1", 0)
    assert repr(accumulator) == "MomentAccumulator(dim=7, name='fc1'): 0 rows"
    with pytest.raises(AttributeError):
        scorer.gamma = 9


@pytest.mark.parametrize("dtype", DTYPES)
def test_moment_accumulator(dtype):
    x = batch(5, 70, 33, dtype=dtype).add(0.5)
    accumulator = core.MomentAccumulator(33)
    accumulator.update(x[:2])
    accumulator.update(x[2:].transpose(0, 1))
    rows = x.double().reshape(-1, 33).numpy()
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6
    assert accumulator.rows == 350
    np.testing.assert_allclose(accumulator.sum(), rows.sum(0), rtol=1e-12)
    np.testing.assert_allclose(accumulator.second_moment(), rows.T @ rows, rtol=tolerance, atol=tolerance * 350)


def test_merge_and_merge_with_itself():
    q, k = batch(4, 9, 2, 6, seed=7), batch(4, 9, 2, 6, seed=8)
    whole, left, right = (core.AttentionScorer(2, 6, moments=True) for _ in range(3))
    whole.update(q, k)
    left.update(q[:1], k[:1])
    right.update(q[1:], k[1:])
    left.merge(right)
    assert left.images == 4
    np.testing.assert_allclose(left.scores(), whole.scores(), rtol=1e-14)
    np.testing.assert_allclose(left.score_gram(), whole.score_gram(), rtol=1e-12)
    left.merge(left)
    assert left.images == 8
    np.testing.assert_allclose(left.scores(), whole.scores(), rtol=1e-14)

    accumulator = core.MomentAccumulator(6)
    accumulator.update(q)
    accumulator.merge(accumulator)
    np.testing.assert_allclose(accumulator.sum(), 2 * q.sum((0, 1, 2)), atol=1e-12)


def test_batches_and_merges_change_moments_little():
    """float32 products are summed by batch, then in float64: 1e-6 by batch; merges add float64 sums, 1e-12."""
    x = batch(13, 101, 33, dtype=torch.float32, seed=30) + 0.5
    whole = core.MomentAccumulator(33)
    whole.update(x)
    scale = np.sqrt(np.diag(whole.second_moment()))
    size = scale[:, None] * scale
    for sizes in ([1] * 13, [5, 8], [2, 3, 8]):
        straight, merged = core.MomentAccumulator(33), core.MomentAccumulator(33)
        for part in x.split(sizes):
            straight.update(part)
            one = core.MomentAccumulator(33)
            one.update(part)
            merged.merge(one)
        assert np.abs(straight.second_moment() - whole.second_moment()).max() <= (1e-6 * size).min()
        assert np.abs(merged.second_moment() - straight.second_moment()).max() <= (1e-12 * size).min()
        np.testing.assert_allclose(straight.sum(), whole.sum(), rtol=1e-6)
        np.testing.assert_allclose(merged.sum(), straight.sum(), rtol=1e-12)
        assert straight.rows == merged.rows == whole.rows == 13 * 101


def test_rows_are_normalised_and_strided_as_asked():
    x = batch(5, 9, 14, dtype=torch.float16, seed=31) * 3 + 7
    exact = x.double()
    for norm, centred in (("rms", exact), ("layer", exact - exact.mean(-1, keepdim=True))):
        unit = centred * 14**0.5 / centred.norm(dim=-1, keepdim=True)
        chosen = torch.cat([unit[b, (b + 2) % 4 :: 4] for b in range(5)])
        accumulator = core.MomentAccumulator(14)
        accumulator.update(x, norm=norm, stride=4, phase=2)
        assert accumulator.rows == len(chosen)
        np.testing.assert_allclose(accumulator.second_moment(), chosen.T @ chosen, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(accumulator.sum(), chosen.sum(0), rtol=1e-5, atol=1e-5)
    accumulator = core.MomentAccumulator(14, name="norm1")
    for arguments, text in (
        ({"norm": "batch"}, "norm: expected 'none', 'rms' or 'layer', got 'batch'"),
        ({"stride": 0}, "norm1 stride: expected 1 to 2147483648, got 0"),
        ({"stride": 2, "phase": -1}, "norm1 phase: expected at least 0, got -1"),
    ):
        with pytest.raises(errors.InvalidArgument, match=text):
            accumulator.update(x, **arguments)
    with pytest.raises(errors.InvalidArgument, match="norm1 x: expected shape .images, tokens, dim. with a stride"):
        accumulator.update(x[0], stride=2)
    assert accumulator.rows == 0


# --- state -------------------------------------------------------------------------------------


def scorer_with_state():
    scorer = core.AttentionScorer(2, 6, moments=True)
    scorer.update(batch(3, 9, 2, 6, seed=9), batch(3, 9, 2, 6, seed=10))
    return scorer


def test_scorer_state():
    scorer = scorer_with_state()
    state = scorer.state()
    assert {key: (array.shape, str(array.dtype)) for key, array in state.items()} == {
        "images": ((1,), "int64"),
        "tokens": ((1,), "int64"),
        "score_sum": ((2, 6), "float64"),
        "query_gram": ((2, 21), "float64"),
        "key_gram": ((2, 21), "float64"),
        "score_gram": ((2, 21), "float64"),
    }
    assert (state["images"][0], state["tokens"][0]) == (3, 27)
    for name in ("query_gram", "key_gram", "score_gram"):
        np.testing.assert_array_equal(unpack(state[name], 6), getattr(scorer, name)())
    np.testing.assert_array_equal(state["score_sum"] / 3, scorer.scores())
    assert set(core.AttentionScorer(2, 6).state()) == {"images", "tokens", "score_sum"}


def test_states_are_copies_and_come_back():
    scorer = scorer_with_state()
    state = scorer.state()
    state["score_sum"][:] = -1
    assert (scorer.scores() > 0).all()
    other = core.AttentionScorer(2, 6, moments=True)
    state = {key: np.asfortranarray(array) for key, array in scorer.state().items()}
    for array in state.values():
        array.flags.writeable = False
    other.load_state(state)
    for key, array in scorer.state().items():
        np.testing.assert_array_equal(other.state()[key], array)

    accumulator = core.MomentAccumulator(6)
    accumulator.update(batch(10, 6))
    copy = core.MomentAccumulator(6)
    copy.load_state(accumulator.state())
    np.testing.assert_array_equal(copy.second_moment(), accumulator.second_moment())
    np.testing.assert_array_equal(unpack(copy.state()["second_moment"], 6), accumulator.second_moment())
    assert (copy.rows, copy.state()["sum"].shape) == (10, (6,))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"images": None}, errors.InvalidArgument, "state: expected keys images, tokens, score_sum"),
        ({"more": np.zeros(1)}, errors.InvalidArgument, "state: expected keys images, tokens, score_sum"),
        ({"images": 3}, errors.InvalidArgument, "images: expected a numpy array, got int"),
        ({"images": np.array([3.0])}, errors.InvalidArgument, "images: expected dtype int64, got float64"),
        ({"images": np.array(3)}, errors.InvalidArgument, r"images: expected shape \(1,\), got \(\)"),
        ({"images": np.array([-3])}, errors.InvalidArgument, "images: expected at least 0, got -3"),
        ({"tokens": np.array([2])}, errors.InvalidArgument, "tokens: expected at least 3, got 2"),
        ({"score_sum": np.zeros(12)}, errors.InvalidArgument, r"score_sum: expected shape \(2, 6\), got \(12,\)"),
        (
            {"key_gram": np.zeros((2, 21), np.float32)},
            errors.InvalidArgument,
            "key_gram: expected dtype float64, got float32",
        ),
        (
            {"score_gram": np.full((2, 21), np.nan)},
            errors.NumericalError,
            "score_gram: expected finite values, got nan at 0",
        ),
    ],
)
def test_bad_states_replace_nothing(change, error, text):
    scorer = scorer_with_state()
    before = scorer.state()
    state = {key: value for key, value in (before | change).items() if value is not None}
    with pytest.raises(error, match=text):
        scorer.load_state(state)
    for key, array in scorer.state().items():
        np.testing.assert_array_equal(array, before[key])


def test_a_state_is_a_mapping():
    with pytest.raises(errors.InvalidArgument, match="state: expected a mapping with keys rows, sum, second_moment"):
        core.MomentAccumulator(2).load_state([1, 2])


# --- value similarity, select ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_value_similarity(dtype):
    weights = batch(3, 7, 20, dtype=dtype, seed=11)
    weights[1, 2] = 0
    expected = literal_similarity(weights.double().reshape(21, 20).numpy())
    np.testing.assert_allclose(core.value_similarity(weights), expected.reshape(3, 7), atol=1e-12)
    np.testing.assert_allclose(core.value_similarity(weights.reshape(21, 20)), expected, atol=1e-12)
    scores = core.value_similarity(torch.nn.Parameter(weights.double()).flip(2).transpose(0, 1))
    np.testing.assert_allclose(scores, expected.reshape(3, 7).T, atol=1e-12)


def test_value_similarity_from_moment():
    rows = batch(12, 40, seed=12).numpy()
    rows[5] = 0
    expected = literal_similarity(rows)
    np.testing.assert_allclose(core.value_similarity_from_moment(rows @ rows.T), expected, atol=1e-12)
    accumulator = core.MomentAccumulator(12)
    accumulator.update(rows.T)
    np.testing.assert_allclose(core.value_similarity_from_moment(accumulator.second_moment()), expected, atol=1e-12)


def test_select():
    scores = np.array([[1.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    kept = core.select(scores, 2)
    assert kept.dtype == np.int64
    np.testing.assert_array_equal(kept, [[1, 3], [0, 1]])
    np.testing.assert_array_equal(core.select(scores[0], 3), [1, 2, 3])
    np.testing.assert_array_equal(core.select(torch.tensor([2.0, 1.0, 2.0], dtype=torch.bfloat16), 1), [0])
    np.testing.assert_array_equal(core.select(scores[0, ::-1], 1), [0])
    with pytest.raises(errors.InvalidArgument, match="keep: expected 1 to 4, got 5"):
        core.select(scores, 5)
    with pytest.raises(errors.InvalidArgument, match=r"scores: expected shape \(n,\) or \(groups, n\), got \(\)"):
        core.select(np.array(3.0), 1)
    with pytest.raises(errors.NumericalError, match=r"scores: expected values with an order, got nan at \(0, 1\)"):
        core.select(np.array([1, np.nan]), 1)


# --- compact -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_compact_packs_what_is_contiguous(dtype):
    tensor = torch.arange(60).reshape(3, 4, 5).to(dtype)
    expected = tensor[:, [0, 3]].clone()
    address = tensor.data_ptr()
    shape, strides = core.compact(tensor, 1, [0, 3])
    assert (shape, strides) == ((3, 2, 5), (10, 5, 1))
    assert tensor.data_ptr() == address
    assert torch.equal(torch.as_strided(tensor, shape, strides), expected)
    # The owner can shrink the memory.
    tensor.untyped_storage().resize_(30 * tensor.element_size())
    assert torch.equal(tensor.set_(tensor.untyped_storage(), 0, shape, strides), expected)


def test_compact_writes_inside_of_the_view_only():
    parent = np.arange(80.0).reshape(8, 10)
    expected = parent.copy()
    view = parent[1:7:2, 8:2:-2]
    kept = view[:, [0, 2]].copy()
    shape, strides = core.compact(view, 1, np.array([0, 2]))
    assert (shape, strides) == ((3, 2), (20, -2))
    np.testing.assert_array_equal(view[:, :2], kept)
    mine = np.zeros_like(parent, dtype=bool)
    mine[1:7:2, 8:2:-2] = True
    np.testing.assert_array_equal(parent[~mine], expected[~mine])


def test_compact_takes_parameters_and_every_kind_of_indices():
    for keep in ([1, 2], (1, 2), np.array([1, 2], np.uint8), torch.tensor([1, 2]), range(1, 3)):
        parameter = torch.nn.Parameter(torch.arange(6.0).reshape(3, 2))
        core.compact(parameter, 0, keep)
        assert parameter.flatten()[:4].tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("keep", "text"),
    [
        ([], "keep: expected at least one index, got none"),
        ([0, 3], r"keep: expected indices in \[0, 3\), got 3"),
        ([1, 0], "keep: expected ascending, unique indices, got 0 after 1"),
        ([0.0, 1.0], "keep: expected integers, got float64"),
        ([True, False, True], "keep: expected integers, got bool"),
        ([[0, 1]], "keep: expected one dimension, got 2"),
        (1, "keep: expected one dimension, got 0"),
        (None, "keep: expected one dimension, got 0"),
        ([[0], [0, 1]], "keep: expected a sequence of integers, got list"),
        (["a"], "keep: expected integers, got <U1"),
    ],
)
def test_compact_refuses_before_anything_moves(keep, text):
    array = np.arange(6.0).reshape(3, 2)
    with pytest.raises(errors.InvalidArgument, match=text):
        core.compact(array, 0, keep)
    np.testing.assert_array_equal(array.ravel(), range(6))


def test_unpack():
    packed = np.random.default_rng(0).normal(size=(3, 2, 65 * 66 // 2))
    full = np.full((3, 2, 65, 65), np.nan)
    core.unpack(packed, full, 7)
    np.testing.assert_array_equal(full, unpack(packed / 7, 65))
    found = torch.zeros(2, 2, dtype=torch.float64)
    core.unpack(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), found)
    assert found.tolist() == [[1, 2], [2, 3]]
    full.flags.writeable = False
    with pytest.raises(errors.InvalidArgument, match="out: expected writable memory, got a read-only array"):
        core.unpack(packed, full)
    with pytest.raises(errors.InvalidArgument, match="divisor: expected a finite number above 0, got 0"):
        core.unpack(packed, full.copy(), 0)


def test_compact_refuses_read_only_and_shared_memory():
    array = np.arange(6.0)
    array.flags.writeable = False
    with pytest.raises(errors.InvalidArgument, match="tensor: expected writable memory, got a read-only array"):
        core.compact(array, 0, [1])
    if np.lib.NumpyVersion(np.__version__) >= "2.1.0":  # before, NumPy does not export it at all
        with pytest.raises(errors.InvalidArgument, match="tensor: expected writable memory"):
            core.compact(Exporter(array), 0, [1])
    with pytest.raises(errors.InvalidArgument, match="tensor: expected elements that do not share memory"):
        core.compact(torch.zeros(3, 1).expand(3, 4), 1, [1])


# --- what comes in -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x,
        lambda x: x.numpy(),
        lambda x: x.clone().requires_grad_(),
        lambda x: Exporter(x.numpy()),
        lambda x: Exporter(x.numpy(), requires_grad=True),
        lambda x: OldExporter(x.numpy()),
        lambda x: x.T.contiguous().T,
        lambda x: x.numpy()[::-1].copy()[::-1],
        lambda x: np.frombuffer(x.numpy().tobytes(), np.float64).reshape(x.shape),  # read-only
        lambda x: torch.nn.Parameter(x),
    ],
)
def test_all_arrays_are_taken(make):
    x = batch(9, 5, seed=13)
    np.testing.assert_array_equal(core.value_similarity(make(x)), core.value_similarity(x))


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: [[1.0]], errors.InvalidArgument, "x: expected an array or tensor .*, got list"),
        (lambda: None, errors.InvalidArgument, "x: expected an array or tensor .*, got NoneType"),
        (lambda: torch.ones(2, 2).int(), errors.InvalidArgument, "x: expected dtype .*, got int32"),
        (lambda: torch.ones(2, 2).bool(), errors.InvalidArgument, "x: expected dtype .*, got bool"),
        (lambda: torch.ones(2, 2).cfloat(), errors.InvalidArgument, "x: expected dtype .*, got complex64"),
        (lambda: torch.ones(2, 2).to(torch.float8_e5m2), errors.InvalidArgument, "x: expected dtype .*, got float8"),
        (
            lambda: torch.ones(2, 2, dtype=torch.cfloat).conj().imag,
            errors.InvalidArgument,
            "x: expected values in memory",
        ),
        (lambda: np.ones((2, 2), int), errors.InvalidArgument, "x: expected dtype .*, got int64"),
        (lambda: np.ones((2, 2), ">f4"), errors.InvalidArgument, "x: expected dtype .*, got >f4"),
        (lambda: np.ones((2, 2), complex), errors.InvalidArgument, "x: expected dtype .*, got complex128"),
        (lambda: np.array([["a"]]), errors.InvalidArgument, "x: expected dtype .*, got <U1"),
        (lambda: np.ones((1,) * 9), errors.InvalidArgument, "x: expected at most 8 dimensions, got 9"),
        (lambda: torch.ones((1,) * 9), errors.InvalidArgument, "x: expected at most 8 dimensions, got 9"),
        (lambda: torch.ones(2, 2).to_sparse(), errors.InvalidArgument, "x: expected a strided CPU tensor, got Tensor"),
        (lambda: torch.ones(2, 2, device="meta"), errors.Unsupported, "x: expected a tensor on the CPU, got .*meta"),
        (lambda: FakeTensor(device=2), errors.Error, "x: expected .*cuda:1"),
        (lambda: FakeTensor(device=8), errors.Unsupported, "x: expected a tensor on the CPU, got one on DLPack device"),
        (lambda: FakeTensor(lanes=4), errors.InvalidArgument, "x: expected dtype"),
        (lambda: np.ones(3), errors.InvalidArgument, r"x: expected shape \(..., 2\), got \(3,\)"),
        (
            lambda: np.ones(9, np.int8)[1:].view(np.float32).reshape(1, 2),
            errors.InvalidArgument,
            "x: expected memory aligned to 4 bytes",
        ),
        (
            lambda: np.zeros(4, [("a", "f4"), ("b", "i1")])["a"][:2],
            errors.InvalidArgument,
            "x: expected strides of whole elements, got 5 bytes along axis 0",
        ),
    ],
)
@pytest.mark.parametrize("name", ["", "blocks.1.mlp.fc2"])
def test_everything_else_is_refused_by_name(make, error, text, name):
    accumulator = core.MomentAccumulator(2, name=name)
    with pytest.raises(error, match=f"^{name} {text}" if name else f"^{text}"):
        accumulator.update(make())
    assert accumulator.rows == 0


def test_dlpack_offset_missing_strides_and_deleter():
    fake = FakeTensor()
    accumulator = core.MomentAccumulator(2)
    accumulator.update(fake)
    assert fake.deleted == 1
    np.testing.assert_array_equal(accumulator.sum(), [4, 6])
    broken = FakeTensor(lanes=4)
    with pytest.raises(errors.InvalidArgument):
        accumulator.update(broken)
    assert broken.deleted == 1


def test_references_are_given_back():
    tensor, array = torch.ones(3, 2), np.ones((3, 2))
    accumulator = core.MomentAccumulator(2)
    before = sys.getrefcount(tensor), sys.getrefcount(array)
    for _ in range(10):
        accumulator.update(tensor)
        accumulator.update(array)
        with pytest.raises(errors.InvalidArgument):
            core.MomentAccumulator(3).update(array)
    assert (sys.getrefcount(tensor), sys.getrefcount(array)) == before


def test_non_finite_batches_leave_no_trace():
    scorer = core.AttentionScorer(1, 8, name="blocks.3.attn")
    q, k = batch(2, 6, 1, 8, seed=14), batch(2, 6, 1, 8, seed=15)
    scorer.update(q, k)
    before = scorer.scores()
    q[1, 5, 0, 7] = torch.nan
    text = r"^blocks.3.attn q: expected finite values, got nan at \(image 1, token 5, head 0, channel 7\)$"
    with pytest.raises(errors.NumericalError, match=text):
        scorer.update(q, k)
    np.testing.assert_array_equal(scorer.scores(), before)
    assert scorer.images == 2


def test_errors_are_the_packages_and_the_languages():
    with pytest.raises(ValueError, match="heads: expected 1 to 65536, got 0") as caught:
        core.AttentionScorer(0, 4)
    assert type(caught.value) is errors.InvalidArgument
    with pytest.raises(ArithmeticError):
        core.value_similarity(np.array([[np.inf]]))
    with pytest.raises(errors.InvalidArgument, match="gamma: expected at least 1, got 0"):
        core.AttentionScorer(1, 4, 0)
    with pytest.raises(errors.InvalidArgument, match="scores: expected at least one image, got none"):
        core.AttentionScorer(1, 4).scores()
    with pytest.raises(errors.InvalidArgument, match="key_gram: expected a scorer with moments, got one without"):
        core.AttentionScorer(1, 4).key_gram()
    with pytest.raises(TypeError):
        core.AttentionScorer(1, 4, 8, True)


# --- threads, instruction sets, packaging --------------------------------------------------------


def test_threads_change_no_bit():
    q, k = batch(5, 30, 3, 16, seed=16, dtype=torch.float32), batch(5, 30, 3, 16, seed=17, dtype=torch.float32)
    before = core.runtime.threads()
    results = []
    try:
        for threads in (1, 2, 3, 5):
            core.runtime.set_threads(threads)
            assert core.runtime.threads() == threads
            scorer, accumulator = core.AttentionScorer(3, 16, moments=True), core.MomentAccumulator(16)
            scorer.update(q, k)
            accumulator.update(q)
            results.append([*scorer.state().values(), *accumulator.state().values(), core.value_similarity(q[0])])
        with pytest.raises(errors.InvalidArgument, match="n: expected 1 to 1024, got 0"):
            core.runtime.set_threads(0)
    finally:
        core.runtime.set_threads(before)
    for other in results[1:]:
        for left, right in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(left, right)


def test_python_threads_share_an_object():
    """Without the GIL and without turns, sums would lose what another thread adds meanwhile."""
    x = np.ones((1, 64))
    accumulator, other = core.MomentAccumulator(64), core.MomentAccumulator(64)
    rounds = 3000

    def work():
        for i in range(rounds):
            accumulator.update(x)
            if i % 100 == 0:
                other.merge(accumulator)
                assert accumulator.state()["sum"][0] <= accumulator.rows

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert accumulator.rows == 4 * rounds
    assert (accumulator.sum() == 4 * rounds).all()
    assert (accumulator.second_moment() == 4 * rounds).all()


def in_threads(*works):
    """Run functions side by side; what the first of them raised is raised."""
    failures = []

    def caught(work):
        try:
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=caught, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    if failures:
        raise failures[0]


def queries_and_keys_of(seed):
    x = np.random.default_rng(seed).normal(size=(2, 2, 19, 3, 13))
    return x.astype(np.float32)


@pytest.mark.parametrize("team", ["own", "openmp"])
def test_scorers_of_their_own_work_side_by_side(team):
    """The same bits as one after the other, while all share the core's threads."""
    before = core.runtime.team(), core.runtime.threads()
    core.runtime.set_team(team)
    core.runtime.set_threads(2)

    def work(seed, found):
        scorer, accumulator = core.AttentionScorer(3, 13, gamma=4), core.MomentAccumulator(13)
        for step in range(10):
            q, k = queries_and_keys_of(100 * seed + step)
            scorer.update(q, k)
            accumulator.update(q)
        found[seed] = scorer.scores(), accumulator.second_moment()

    try:
        alone, together = {}, {}
        for seed in range(4):
            work(seed, alone)
        in_threads(*(partial(work, seed, together) for seed in range(4)))
    finally:
        core.runtime.set_team(before[0])
        core.runtime.set_threads(before[1])
    for seed in range(4):
        for mine, theirs in zip(alone[seed], together[seed], strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_a_shared_scorer_takes_turns():
    """All updates, merges and reads of four threads: the sums of one after the other, up to their order."""
    expected, shared, other = (core.AttentionScorer(3, 13, gamma=4, moments=True) for _ in range(3))
    for seed in range(40):
        expected.update(*queries_and_keys_of(seed))

    def work(first):
        for seed in range(first, 40, 4):
            shared.update(*queries_and_keys_of(seed))
            # A state is of one moment: never between an image's count and its scores.
            state = shared.state()
            assert state["images"][0] % 2 == 0
            if seed % 8 == 0:
                other.merge(shared)

    in_threads(*(partial(work, first) for first in range(4)))
    mine, theirs = shared.state(), expected.state()
    assert mine["images"][0] == 80
    for name, array in theirs.items():
        np.testing.assert_allclose(mine[name], array, rtol=1e-12, atol=1e-12 * np.abs(array).max(), err_msg=name)


def overlapping(work):
    """How often a thread of Python ran while another was in the core."""
    ticks, stop = [0], threading.Event()

    def tick():
        while not stop.wait(0.001):
            ticks[0] += 1

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        before = ticks[0]
        work()
        return ticks[0] - before
    finally:
        stop.set()
        thread.join()


def test_the_gil_is_released_by_what_takes_long():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20000, 300)).astype(np.float32)
    q, k = rng.normal(size=(2, 48, 197, 4, 64)).astype(np.float32)
    weights, root = rng.normal(size=(2, 400, 400))
    inverse = root @ root.T / 400 + np.eye(400)
    works = {
        "AttentionScorer.update": lambda: core.AttentionScorer(4, 64, gamma=8).update(q, k),
        "MomentAccumulator.update": lambda: core.MomentAccumulator(300).update(x),
        "eliminate": lambda: core.eliminate(inverse, weights, 300),
    }
    for name, work in works.items():
        # A kernel that holds the GIL lets nobody tick, however often it is called.
        assert max(overlapping(work) for _ in range(3)) >= 3, name


def test_the_gil_is_released():
    weights = np.random.default_rng(0).normal(size=(3000, 500))
    ticks, stop = [0], threading.Event()

    def tick():
        while not stop.wait(0.001):
            ticks[0] += 1

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        before, start = ticks[0], time.perf_counter()
        core.value_similarity(weights)
        seconds, counted = time.perf_counter() - start, ticks[0] - before
    finally:
        stop.set()
        thread.join()
    assert counted >= 3, f"{counted} ticks of 1 ms in {seconds} s"


LOAD = f"""
import importlib.util, json, resource, sys
spec = importlib.util.spec_from_file_location("_core", {str(EXTENSION)!r})
core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)
import numpy as np
"""


def run(script, **environment):
    command = [sys.executable, "-c", LOAD + script]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("isa", core.runtime.available_isas())
def test_every_instruction_set_gives_the_same_scores(isa):
    script = """
generator = np.random.default_rng(0)
q, k = generator.normal(size=(2, 2, 40, 3, 33))
scorer = core.AttentionScorer(3, 33)
scorer.update(q, k)
print(json.dumps([core.runtime.isa(), scorer.scores().tolist()]))
"""
    result = run(script, SECATEUR_ISA=isa)
    assert result.returncode == 0, result.stderr
    name, scores = json.loads(result.stdout)
    assert name == isa
    q, k = np.random.default_rng(0).normal(size=(2, 2, 40, 3, 33))
    np.testing.assert_allclose(scores, mean_scores(q, k, 8), atol=1e-11)


def test_an_unknown_instruction_set_stops_the_import():
    result = run("", SECATEUR_ISA="sse9")
    assert result.returncode == 1
    known = ", ".join(core.runtime.available_isas())
    assert f"ImportError: SECATEUR_ISA: expected one of {known} on this machine, got 'sse9'" in result.stderr


def test_version_is_the_packages():
    from importlib.metadata import version

    assert core.runtime.version() == version("secateur")


@pytest.mark.skipif(sys.platform != "linux", reason="ldd and ru_maxrss in KiB")
def test_links_no_torch_and_copies_nothing():
    libraries = subprocess.run(["ldd", str(EXTENSION)], capture_output=True, text=True, check=True).stdout
    assert "libc.so" in libraries
    for name in ("torch", "c10", "python", "cuda", "mkl", "openblas", "gomp"):
        assert name not in libraries, libraries
    # 400 MB, read in another order than it lies in: a copy would show.
    script = """
x = np.ones((64, 1_562_500), np.float32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
accumulator = core.MomentAccumulator(64)
accumulator.update(x.T)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([accumulator.rows, accumulator.sum()[0], before, after]))
"""
    result = run(script)
    assert result.returncode == 0, result.stderr
    rows, total, before, after = json.loads(result.stdout)
    assert rows == total == 1_562_500
    assert before > 390_000
    assert after - before < 100_000


def documented(tree):
    """Yields (dotted name, docstring) of a stub's functions and classes."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name, ast.get_docstring(node)
            if isinstance(node, ast.ClassDef):
                yield from ((f"{node.name}.{name}", text) for name, text in documented(node))


def test_the_stubs_document_what_the_module_does():
    """Editors show the stub's docstrings and help() the module's: one text, up to line breaks."""
    stub = ast.parse(Path(inspect.getfile(errors)).with_name("_core.pyi").read_text(encoding="utf-8"))
    checked = 0
    for name, text in documented(stub):
        if text is None or name.startswith("_"):
            continue
        thing = core
        for part in name.split("."):
            thing = getattr(thing, part)
        document = " ".join(inspect.cleandoc(thing.__doc__).split())
        assert document.endswith(" ".join(text.split())), name
        checked += 1
    assert checked >= 25
    public = {name for name in vars(core) if not name.startswith("_")}
    assert public == {name for name, _ in documented(stub) if "." not in name and not name.startswith("_")}


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("wait", [True, False])
def test_images_go_to_one_after_the_other(turns, wait):
    q, k = (torch.randn(5, 9, 2, 7) for _ in range(2))
    found = [core.AttentionScorer(2, 7, moments=True) for _ in range(turns)]
    rows = [core.MomentAccumulator(7) for _ in range(turns)]
    core.AttentionScorer.update_in_turn(found, q, k, wait=wait)
    core.MomentAccumulator.update_in_turn(
        rows, q[:, :, 0], norm="rms", stride=2, phases=[4 + turn for turn in range(turns)], wait=wait
    )
    for turn, (scorer, moments) in enumerate(zip(found, rows, strict=True)):
        expected, expected_rows = core.AttentionScorer(2, 7, moments=True), core.MomentAccumulator(7)
        expected.update(q[turn::turns], k[turn::turns])
        expected_rows.update(q[turn::turns, :, 0], norm="rms", stride=2, phase=4 + turn)
        scorer.wait()
        moments.wait()
        for one, other in ((scorer, expected), (moments, expected_rows)):
            for name, array in other.state().items():
                np.testing.assert_array_equal(one.state()[name], array, err_msg=name)


class Emptying:
    """A tensor that empties a list, as another thread might, when it is asked for its memory."""

    def __init__(self, tensor, objects):
        self.tensor, self.objects = tensor, objects

    def __dlpack__(self, **arguments):
        watched = [weakref.ref(each) for each in self.objects]
        self.objects.clear()
        assert all(each() is not None for each in watched)
        return self.tensor.__dlpack__(**arguments)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


def test_updates_in_turn_hold_their_objects():
    x = torch.randn(4, 3, 2, 5)
    scorers = [core.AttentionScorer(2, 5) for _ in range(2)]
    core.AttentionScorer.update_in_turn(scorers, Emptying(x, scorers), x)
    rows = [core.MomentAccumulator(5) for _ in range(2)]
    core.MomentAccumulator.update_in_turn(rows, Emptying(x[:, :, 0], rows), phases=[0, 0])
    assert scorers == rows == []


def test_updates_in_turn_refuse_what_does_not_fit():
    scorer, x = core.AttentionScorer(1, 4, name="attn"), torch.randn(2, 3, 1, 4)
    for scorers, text in (
        ([], "scorers: expected 1 to 8, got 0"),
        ([scorer, scorer], "scorers: expected different objects, got the same one twice"),
        ([scorer, None], "scorers: expected objects, got a null pointer"),
        ([scorer, core.AttentionScorer(1, 4, 3)], "attn scorers: expected gamma 8, got 3"),
    ):
        with pytest.raises(errors.InvalidArgument, match=f"^{re.escape(text)}$"):
            core.AttentionScorer.update_in_turn(scorers, x, x)
    rows = core.MomentAccumulator(4, name="fc2")
    with pytest.raises(errors.InvalidArgument, match=r"^fc2 options: expected 1, got 2$"):
        core.MomentAccumulator.update_in_turn([rows], x[:, :, 0], phases=[0, 1])
    assert scorer.images == rows.rows == 0


class Interrupted:
    """What somebody stops by a key while it is being read."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __dlpack__(self, **_):
        raise self.error

    def __array__(self, *_, **__):
        raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), MemoryError("none")])
def test_what_says_nothing_about_an_argument_stays_what_it_is(error):
    with pytest.raises(type(error)) as raised:
        core.value_similarity(Interrupted(error))
    assert raised.value is error
    with pytest.raises(type(error)) as raised:
        core.compact(np.ones((3, 4)), 1, Interrupted(error))
    assert raised.value is error
    with pytest.raises(errors.InvalidArgument, match="keep: expected a sequence of integers, got Interrupted"):
        core.compact(np.ones((3, 4)), 1, Interrupted(RuntimeError("broken")))


def test_results_do_not_depend_on_flushed_subnormals():
    x = np.random.default_rng(0).normal(size=(300, 40)).astype(np.float32) * np.float32(1e-40)
    wanted = core.value_similarity(x)
    assert (wanted > 0).all()
    before = core.runtime.threads()
    try:
        for threads in (1, 2, 5):
            core.runtime.set_threads(threads)
            torch.set_flush_denormal(True)
            try:
                found = core.value_similarity(x)
            finally:
                torch.set_flush_denormal(False)
            assert np.array_equal(found, wanted)
    finally:
        core.runtime.set_threads(before)
