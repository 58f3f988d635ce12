"""The C++ core: scoring and cutting on buffers."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

class _SupportsDLPack(Protocol):
    """A tensor of any framework that exports DLPack, such as torch's."""

    def __dlpack__(self, *, stream: Any = ...) -> Any: ...
    def __dlpack_device__(self) -> tuple[Any, Any]: ...

_Array: TypeAlias = npt.NDArray[Any] | _SupportsDLPack
"""float32, float16, bfloat16 or float64, any strides, taken without a copy; on the CPU unless a function says else."""

class AttentionScorer:
    """Scores the query/key neurons of one attention layer over a stream of images.

    SNP's importance (Shim et al., ECCV 2024, arXiv:2404.11630): the sum over the ``gamma`` leading
    singular triplets of QKᵀ of |cos(u_j, q_i)| |cos(v_j, k_i)|, in float64, averaged over images.
    Neurons and heads of zero norm score 0. The sums have the same bits however the images are split
    into batches and for any number of threads. Threads may share an object; their calls take turns.

    Args:
        heads: attention heads, 1 to 65536.
        head_dim: neurons per head, 1 to 4096.
        gamma: singular triplets that count, at least 1.
        moments: also accumulate QᵀQ, K_cᵀK_c and their elementwise product.
        name: put in front of every error of this object, such as the layer's module path.

    Raises:
        InvalidArgument: a number out of its range.
    """

    def __init__(self, heads: int, head_dim: int, gamma: int = 8, *, moments: bool = False, name: str = "") -> None: ...
    @property
    def heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def gamma(self) -> int: ...
    @property
    def moments(self) -> bool: ...
    @property
    def name(self) -> str: ...
    @property
    def images(self) -> int:
        """Images seen."""

    def update(self, q: _Array, k: _Array) -> None:
        """Adds a batch of images, without a copy and without the GIL.

        Args:
            q: queries (images, tokens, heads, head_dim), any strides; float32, float16, bfloat16,
                float64. On a CUDA device where runtime.has_cuda() (head_dim at most 128): computed
                there, on torch's current stream (that of another framework: the default one), and
                waited for.
            k: keys, the same shape and device; on CUDA the same dtype.

        Raises:
            InvalidArgument: not an array, or another shape, dtype or device.
            Unsupported: on a device that this build does not compute on.
            NumericalError: a NaN or Inf (named by its place); with moments, a magnitude above 1e60.
                The object is then as it was before the call.
        """

    @staticmethod
    def update_in_turn(scorers: Sequence[AttentionScorer], q: _Array, k: _Array, *, wait: bool = True) -> None:
        """Adds image i of a batch to scorer i mod n; on a CUDA device in one pass over all of them.

        Args:
            scorers: 1 to 8 different ones, of the same heads, head_dim, gamma and moments.
            q: queries, as update() takes them.
            k: keys.
            wait: False, on a CUDA device: return when the work is enqueued. What update() would raise
                for values is then raised by wait(), or by whatever asks for the sums: the scorer is then
                as it was before the first batch of its that held such values. The memory of q and k must
                stay as it is until their stream has got there.

        Raises:
            InvalidArgument: no scorers, too many, the same one twice, or of different sizes; and as
                update() raises it.
            Unsupported: as update().
            NumericalError: as update(); scorers whose own images are sound may have them.
        """

    def wait(self) -> None:
        """Waits for what update_in_turn() has enqueued.

        Raises:
            NumericalError: a value that was not finite (or, with moments, too large).
            Error: the device failed.
        """

    def update_grams(self, query_gram: _Array, key_gram: _Array, key_mean: _Array, tokens: int) -> None:
        """Adds a batch of images by its Gram matrices, without the GIL.

        For queries and keys that are where the core does not compute. In float64 from the first
        product, or the scores of trained models are lost to rounding.

        Args:
            query_gram: QᵀQ (images, heads, head_dim, head_dim), on the CPU; the upper triangle is
                read.
            key_gram: K_cᵀK_c, keys less their mean over the image's tokens, the same shape.
            key_mean: that mean, (images, heads, head_dim).
            tokens: of each image, at least 1.

        Raises:
            InvalidArgument: not an array, another shape or dtype, or tokens below 1.
            Unsupported: not on the CPU.
            NumericalError: a NaN or Inf (named by its place), or a magnitude above 1e130.
                The object is then as it was before the call.
        """

    def merge(self, other: AttentionScorer) -> None:
        """Adds what another scorer has seen.

        Raises:
            InvalidArgument: other heads, head_dim, gamma or moments.
        """

    def scores(self) -> npt.NDArray[np.float64]:
        """Mean importance over images, (heads, head_dim).

        Raises:
            InvalidArgument: no image has been seen.
        """

    def query_gram(self) -> npt.NDArray[np.float64]:
        """Σ QᵀQ over images, (heads, head_dim, head_dim).

        Raises:
            InvalidArgument: a scorer without moments.
        """

    def key_gram(self) -> npt.NDArray[np.float64]:
        """Σ K_cᵀK_c over images, keys centred over each image's tokens.

        Raises:
            InvalidArgument: a scorer without moments.
        """

    def score_gram(self) -> npt.NDArray[np.float64]:
        """Σ (QᵀQ)∘(K_cᵀK_c) over images: inner products of the neurons' rank-one score maps.

        Raises:
            InvalidArgument: a scorer without moments.
        """

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Everything accumulated, as arrays to save.

        Returns:
            ``images`` and ``tokens`` (1,) int64; ``score_sum`` (heads, head_dim); with moments
            ``query_gram``, ``key_gram``, ``score_gram`` (heads, d(d+1)/2): upper triangles, row by
            row.
        """

    def load_state(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Replaces everything accumulated by what state() gave.

        Raises:
            InvalidArgument: keys, shapes, dtypes or counts that do not fit this object.
            NumericalError: a value that is not finite. Nothing is replaced then.
        """

class MomentAccumulator:
    """Accumulates rows, Σ x and Σ x xᵀ of a layer's features over a stream of batches.

    float32, float16 and bfloat16 rows are multiplied in float32, at most 4,096 at a time, and added
    up in float64; float64 rows are multiplied in float64. The sums have the same bits for any
    number of threads. Threads may share an object; their calls take turns.

    Args:
        dim: features per row, 1 to 65536.
        name: put in front of every error of this object, such as the layer's module path.

    Raises:
        InvalidArgument: dim out of its range.
    """

    def __init__(self, dim: int, *, name: str = "") -> None: ...
    @property
    def dim(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def rows(self) -> int:
        """Rows seen."""

    def update(
        self, x: _Array, *, norm: Literal["none", "rms", "layer"] = "none", stride: int = 1, phase: int = 0
    ) -> None:
        """Adds every row, without a copy and without the GIL.

        Args:
            x: (..., dim), at least one axis, any strides; float32, float16, bfloat16 or float64. On a
                CUDA device where runtime.has_cuda(): multiplied there, on torch's current stream,
                waited for.
            norm: "rms" adds x √dim / ‖x‖ in place of each row x, "layer" that of x less its mean, as
                an RMSNorm or LayerNorm without weights and eps would; a row of norm 0 stays 0.
            stride: 1 to 2^31; above 1, of x (images, tokens, dim), image b gives only every stride-th token,
                from (phase + b) mod stride on.
            phase: at least 0.

        Raises:
            InvalidArgument: not an array, another last axis or dtype, no such norm, or a number out of
                its range.
            Unsupported: on a device that this build does not compute on.
            NumericalError: a NaN or Inf (named by its place), or a magnitude above 1e120.
                The object is then as it was before the call.
        """

    @staticmethod
    def update_in_turn(
        accumulators: Sequence[MomentAccumulator],
        x: _Array,
        *,
        norm: Literal["none", "rms", "layer"] = "none",
        stride: int = 1,
        phases: Sequence[int],
        wait: bool = True,
    ) -> None:
        """Adds image i of a batch to accumulator i mod n; on a CUDA device in one pass over all of them.

        Args:
            accumulators: 1 to 8 different ones of the same dim.
            x: (images, tokens, dim), as update() takes it.
            norm: as in update().
            stride: as in update().
            phases: of each accumulator, counted over its own images.
            wait: as in AttentionScorer.update_in_turn; without it the memory of x must stay as it is
                until its stream has got there.

        Raises:
            InvalidArgument: no accumulators, too many, the same one twice, or of different sizes; and as
                update() raises it.
            Unsupported: as update().
            NumericalError: as update(); accumulators whose own images are sound may have them.
        """

    def wait(self) -> None:
        """Waits for what update_in_turn() has enqueued.

        Raises:
            NumericalError: a value that was not finite or too large.
            Error: the device failed.
        """

    def merge(self, other: MomentAccumulator) -> None:
        """Adds what another accumulator has seen.

        Raises:
            InvalidArgument: another dim.
        """

    def sum(self) -> npt.NDArray[np.float64]:
        """Σ x over rows, (dim,)."""

    def second_moment(self) -> npt.NDArray[np.float64]:
        """Σ x xᵀ over rows, (dim, dim)."""

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Everything accumulated, as arrays to save.

        Returns:
            ``rows`` (1,) int64; ``sum`` (dim,); ``second_moment`` (dim(dim+1)/2,): the upper
            triangle, row by row.
        """

    def load_state(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Replaces everything accumulated by what state() gave.

        Raises:
            InvalidArgument: keys, shapes, dtypes or counts that do not fit this object.
            NumericalError: a value that is not finite. Nothing is replaced then.
        """

def value_similarity(weights: _Array) -> npt.NDArray[np.float64]:
    """For each row, the sum over all other rows of 1 − |cos|.

    SNP's importance of value neurons (Shim et al., ECCV 2024, arXiv:2404.11630): low where other
    rows, of any head, say the same. A zero row scores 0 and has cosine 0 with every other.

    Args:
        weights: (rows, D), or (heads, head_dim, D) compared across all heads; any strides;
            float32, float16, bfloat16 or float64.

    Returns:
        (rows,) or (heads, head_dim).

    Raises:
        InvalidArgument: not an array, or another shape or dtype.
        Unsupported: not on the CPU.
        NumericalError: a NaN or Inf.
    """

def value_similarity_from_moment(moment: _Array) -> npt.NDArray[np.float64]:
    """value_similarity over activations, from their second moment.

    Args:
        moment: symmetric (R, R) with a diagonal of at least 0; cos_ij = C_ij / sqrt(C_ii C_jj).

    Returns:
        (R,).

    Raises:
        InvalidArgument: not an array, not square, not symmetric, or a negative diagonal.
        Unsupported: not on the CPU.
        NumericalError: a NaN or Inf.
    """

def select(scores: _Array, keep: int) -> npt.NDArray[np.int64]:
    """The highest scores of each group, as ascending indices.

    Args:
        scores: (n,) or (groups, n); of equal scores the lower index is kept.
        keep: how many to keep per group, 1 to n.

    Returns:
        int64 (keep,) or (groups, keep).

    Raises:
        InvalidArgument: not an array, another shape or dtype, or keep out of its range.
        Unsupported: not on the CPU.
        NumericalError: a NaN.
    """

def unpack(packed: _Array, out: _Array, divisor: float = 1.0) -> None:
    """Writes packed symmetric matrices, as the states of scorers and accumulators hold them, in full.

    Args:
        packed: float64 (..., n(n+1)/2), upper triangles row by row; contiguous.
        out: float64 (..., n, n) of the same leading sizes; contiguous, writable, other memory.
        divisor: above 0; every element is divided by it.

    Raises:
        InvalidArgument: not an array, another shape, dtype or stride, read-only memory, memory that
            overlaps packed's, or a divisor that is not above 0; nothing is written then.
        Unsupported: not on the CPU.
    """

def eliminate(inverse: _Array, weights: _Array, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Removes inputs of a linear layer one at a time, always the one that costs least.

    Greedy backward elimination, the optimal brain surgeon for groups (Hassibi & Stork, NIPS 1992;
    arXiv:2608.17657): the remaining inputs' weights make up for each removal, and the next is chosen by
    the weights so changed. Ties: the lower index. The same bits for any number of threads.

    Args:
        inverse: symmetric positive definite (n, n), the inverse of the inputs' second moment or
            covariance C with a ridge; any strides; float32, float16, bfloat16 or float64.
        weights: (n, outputs), row j what reads input j (a torch Linear's weight transposed).
        count: how many to remove, 0 to n.

    Returns:
        int64 (count,), the inputs in the order of their removal, of which any prefix is the answer for
        fewer; and float64 (count,), the least-squares error that each adds: the running sum is
        tr((W − Ŵ)ᵀ C (W − Ŵ)) for the best Ŵ on the inputs that remain.

    Raises:
        InvalidArgument: not an array, another shape or dtype, count out of its range, an asymmetric
            matrix or a diagonal that is not positive.
        Unsupported: not on the CPU.
        NumericalError: a NaN or Inf, costs beyond float64, or a diagonal lost to rounding: an input
            was a linear combination of others to working precision (a larger ridge tells them apart),
            or the matrix is not positive definite.
    """

def compact(
    tensor: _Array, dim: int, keep: Sequence[int] | npt.NDArray[np.integer[Any]] | _SupportsDLPack
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Keeps some indices along one axis, in place, moving memory forward without a second buffer.

    Args:
        tensor: any shape and strides, writable, float32, float16, bfloat16 or float64. A row-major
            contiguous one is packed at the front of its memory, and the rest may be given back; any
            other keeps its strides, and nothing outside of the view is written. On a CUDA device where
            runtime.has_cuda() it is moved there, on torch's current stream, and not waited for; 32
            MiB of the device's memory are used meanwhile.
        dim: the axis, from 0.
        keep: ascending, unique indices, at least one.

    Returns:
        Shape and strides (in elements) of the result, which begins where the tensor began.

    Raises:
        InvalidArgument: a bad index, a read-only or self-overlapping tensor, another dtype.
            Nothing has been moved then.
        Unsupported: on a device that this build does not compute on.
    """

class runtime:  # noqa: N801
    """What the core runs on."""

    @staticmethod
    def isa() -> str:
        """Instruction set in use: SECATEUR_ISA, or the widest this machine has."""

    @staticmethod
    def available_isas() -> list[str]:
        """What this build holds and this machine can run, narrowest first."""

    @staticmethod
    def threads() -> int:
        """Threads a call may use, the caller's included."""

    @staticmethod
    def set_threads(n: int) -> None:
        """Sets the number of threads; results do not depend on it.

        Raises:
            InvalidArgument: not 1 to 1024.
        """

    @staticmethod
    def set_team(team: Literal["own", "openmp"]) -> None:
        """Chooses the threads that calls run on; results do not depend on it.

        Args:
            team: "own", which sleep between calls, or "openmp", those of the OpenMP runtime that this
                process has loaded (torch's), so that its spinning threads are not in the way; best
                with as many threads as those are. A forked child begins with "own", and OpenMP
                cannot run there.

        Raises:
            InvalidArgument: no such team.
            Unsupported: the process has no OpenMP runtime of GCC's interface.
        """

    @staticmethod
    def team() -> Literal["own", "openmp"]:
        """What set_team() chose, "own" from the start."""

    @staticmethod
    def flush_subnormals(on: bool, threads: int = 1) -> bool:
        """Has arithmetic take floats below the normal range as zero, and returns if it did before.

        Processors take a hundred times as long for them. Of the calling thread and of those of the
        OpenMP runtime that this process has loaded (torch's) which work for it.

        Args:
            on: False for what the standard asks for.
            threads: how many of them, the calling one included.

        Raises:
            InvalidArgument: threads is not 1 to 1024.
        """

    @staticmethod
    def has_cuda() -> bool:
        """Does this build compute on CUDA devices? Not whether there is one."""

    @staticmethod
    def version() -> str:
        """Version of the core, major.minor.patch."""
