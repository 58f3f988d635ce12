"""Properties of the core that hold for any input, searched for a counterexample."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from secateur import _core as core
from secateur import errors

SEARCH = settings(deadline=None, derandomize=True, max_examples=150)

FLOATS = st.floats(-1e6, 1e6, width=32)
DTYPES = st.sampled_from([np.float16, np.float32, np.float64])


@st.composite
def views(draw, dtype=np.float64, max_dims=4):
    """A strided, possibly reversed and permuted view, and the array that owns its memory."""
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=max_dims))
    steps = [draw(st.sampled_from([1, 2, 3, -1, -2])) for _ in shape]
    starts = [draw(st.integers(0, 2)) for _ in shape]
    sizes = [start + size * abs(step) for start, size, step in zip(starts, shape, steps, strict=True)]
    parent = np.arange(np.prod(sizes), dtype=dtype).reshape(sizes)
    window = tuple(
        slice(start, start + size * abs(step), abs(step))
        for start, size, step in zip(starts, shape, steps, strict=True)
    )
    view = parent[window][tuple(slice(None, None, -1 if step < 0 else 1) for step in steps)]
    return parent, view.transpose(draw(st.permutations(range(len(shape)))))


@SEARCH
@given(data=st.data(), dtype=DTYPES)
def test_compact_is_take(data, dtype):
    parent, view = data.draw(views(dtype))
    dim = data.draw(st.integers(0, view.ndim - 1))
    size = view.shape[dim]
    keep = sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=size)))
    expected = view.take(keep, dim)
    outside = parent.copy()
    marks = np.zeros(parent.shape, bool)
    address = parent.__array_interface__["data"][0]
    np.lib.stride_tricks.as_strided(
        marks.ravel()[(view.__array_interface__["data"][0] - address) // parent.itemsize :],
        view.shape,
        [stride // parent.itemsize for stride in view.strides],
    )[...] = True

    shape, strides = core.compact(view, dim, keep)
    assert shape == expected.shape
    result = np.lib.stride_tricks.as_strided(view, shape, [stride * view.itemsize for stride in strides])
    np.testing.assert_array_equal(result, expected)
    np.testing.assert_array_equal(parent[~marks], outside[~marks])
    if view.flags.c_contiguous:
        assert result.flags.c_contiguous


@SEARCH
@given(data=st.data(), dtype=DTYPES)
def test_select_keeps_the_best(data, dtype):
    scores = data.draw(hnp.arrays(dtype, st.tuples(st.integers(1, 4), st.integers(1, 20)), elements=st.integers(0, 5)))
    keep = data.draw(st.integers(1, scores.shape[1]))
    expected = np.sort(np.argsort(-scores, axis=1, kind="stable")[:, :keep], axis=1)
    np.testing.assert_array_equal(core.select(scores, keep), expected)


@SEARCH
@given(data=st.data())
def test_accumulated_moments_do_not_depend_on_the_view(data):
    _, view = data.draw(views())
    accumulator, plain = core.MomentAccumulator(view.shape[-1]), core.MomentAccumulator(view.shape[-1])
    accumulator.update(view)
    plain.update(np.ascontiguousarray(view))
    np.testing.assert_array_equal(accumulator.second_moment(), plain.second_moment())
    rows = view.reshape(-1, view.shape[-1])
    np.testing.assert_allclose(accumulator.second_moment(), rows.T @ rows, rtol=1e-14)
    np.testing.assert_allclose(accumulator.sum(), rows.sum(0), rtol=1e-14)


@SEARCH
@given(
    data=st.data(),
    images=st.integers(1, 4),
    tokens=st.integers(1, 12),
    heads=st.integers(1, 3),
    dim=st.integers(1, 12),
    gamma=st.integers(1, 14),
)
def test_scores_are_bounded_and_follow_permutations(data, images, tokens, heads, dim, gamma):
    """0 ≤ ω ≤ γ for any finite input, and a neuron or head takes its score with it when it moves."""
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    shape = (images, tokens, heads, dim)
    scale = 10.0 ** data.draw(st.integers(-12, 12))
    q, k = generator.normal(size=shape) * scale, generator.normal(size=shape)
    scorer = core.AttentionScorer(heads, dim, gamma)
    scorer.update(q, k)
    scores = scorer.scores()
    assert np.isfinite(scores).all()
    assert (scores >= 0).all()
    assert (scores <= gamma * (1 + 1e-9)).all()

    channels, order, rows = (generator.permutation(n) for n in (dim, heads, tokens))
    moved = core.AttentionScorer(heads, dim, gamma)
    moved.update(q[:, rows][:, :, order][..., channels], k[:, rows][:, :, order][..., channels])
    np.testing.assert_allclose(moved.scores(), scores[order][:, channels], atol=1e-6)


@SEARCH
@given(
    hnp.arrays(
        np.float64,
        st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 2), st.integers(1, 5)),
        elements=FLOATS,
    ),
    st.data(),
)
def test_any_finite_batch_is_scored(q, data):
    """Zeros, duplicates, constants and rank-one heads: whatever a search makes of small arrays."""
    k = data.draw(hnp.arrays(np.float64, q.shape, elements=FLOATS))
    scorer = core.AttentionScorer(q.shape[2], q.shape[3], moments=True)
    scorer.update(q, k)
    scores = scorer.scores()
    assert np.isfinite(scores).all()
    assert (scores >= 0).all()
    silent = (q == 0).all((0, 1)) | (k == 0).all((0, 1))
    assert (scores[silent] == 0).all()
    gram = np.einsum("bnhi,bnhj->hij", q, q)
    scale = np.sqrt(np.einsum("hii,hjj->hij", gram, gram))
    assert (np.abs(scorer.query_gram() - gram) <= 1e-13 * scale).all()


@SEARCH
@given(data=st.data())
def test_one_bad_value_is_found(data):
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 3), st.integers(1, 70)))
    place = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
    bad = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    dtype = data.draw(DTYPES)
    q, k = np.ones(shape, dtype), np.ones(shape, dtype)
    which = data.draw(st.sampled_from(["q", "k"]))
    (q if which == "q" else k)[place] = bad
    scorer = core.AttentionScorer(shape[2], shape[3])
    text = "{} at \\(image {}, token {}, head {}, channel {}\\)".format(bad, *place)
    with pytest.raises(errors.NumericalError, match=f"^{which}: expected finite values, got {text}$"):
        scorer.update(q, k)
    assert scorer.images == 0
