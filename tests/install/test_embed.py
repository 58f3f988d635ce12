"""cmake --install or a wheel, and C++ programs elsewhere that find and use what was installed."""

from __future__ import annotations

import ctypes
import re
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import secateur as sc
from commands import run
from secateur import core
from vits import buffers, images, vit

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("shared", ["OFF", "ON"])
def test_an_installed_library_embeds(tmp_path: Path, shared: str) -> None:
    build, prefix = tmp_path / "build", tmp_path / "prefix"
    # Compiles in half the time, but contracts products and sums elsewhere than the extension, for other bits.
    quick = ["-DCMAKE_CXX_FLAGS_RELEASE=-O0 -DNDEBUG"] if shared == "OFF" else []
    # Without CUDA, whose kernels take a minute more.
    quick.append("-DSECATEUR_CUDA=OFF")
    run("cmake", "-S", ROOT, "-B", build, "-DCMAKE_BUILD_TYPE=Release", *quick, f"-DBUILD_SHARED_LIBS={shared}")
    run("cmake", "--build", build, "--parallel", 2)
    run("cmake", "--install", build, "--prefix", prefix)
    brings_all_headers(prefix / "include")
    # The installed package has to stand alone, and may be moved.
    shutil.rmtree(build)
    moved = prefix.rename(tmp_path / "moved")
    names_no_folder(moved, ROOT, tmp_path)
    the_examples_build_and_run(tmp_path, f"-DCMAKE_PREFIX_PATH={moved}")
    if shared == "ON":
        exports_nothing_else(next(moved.rglob("libsecateur.so")))
        gives_the_bits_of_python(next(moved.rglob("libsecateur.so")))


def test_a_wheel_embeds(tmp_path: Path) -> None:
    """Installed elsewhere than where it was built, with no other secateur to be seen."""
    build, dist, venv = tmp_path / "build", tmp_path / "dist", tmp_path / "venv"
    pip = sys.executable, "-m", "pip", "--disable-pip-version-check"
    # Compiles in half the time. The CUDA kernels take a minute more: as in make, they are compiled where a GPU is; what
    # a CUDA extension links elsewhere is a step of .ci/run.
    quick = (
        f"cmake.define.SECATEUR_CUDA={'AUTO' if Path('/dev/nvidia0').exists() else 'OFF'}",
        "cmake.define.CMAKE_CXX_FLAGS_RELEASE=-O0 -DNDEBUG",
        "cmake.define.CMAKE_INTERPROCEDURAL_OPTIMIZATION=OFF",
        "cmake.define.CMAKE_CUDA_ARCHITECTURES=75",
    )
    options = [f"--config-settings={setting}" for setting in (f"build-dir={build}", *quick)]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", dist, *options, ROOT)
    shutil.rmtree(build)
    (wheel,) = dist.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        # What would be links is whole files in a wheel.
        assert len([name for name in archive.namelist() if "libsecateur" in name]) == 1

    python = venv / "bin" / "python"
    run(sys.executable, "-m", "venv", "--without-pip", venv)
    (site,) = venv.glob("lib/python*/site-packages")
    # torch and timm from here, but not what editable installs hook into imports.
    others = [path for path in sys.path if path.endswith("-packages")]
    (site / "others.pth").write_text("\n".join(others))
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel)
    cmake_dir = Path(run(python, "-m", "secateur", "--cmake-dir").strip())
    assert cmake_dir.is_relative_to(site)

    brings_all_headers(site / "secateur" / "include")
    names_no_folder(site / "secateur", ROOT, tmp_path)
    (library,) = (site / "secateur").rglob("libsecateur.so*")
    exports_nothing_else(library)
    (extension,) = (site / "secateur").glob("_core.*.so")
    for path in (library, extension):
        assert "PATH" not in run("readelf", "-d", path)
        needed = re.findall(r"(\S+) => ", run("ldd", path))
        assert {re.match(r"[a-z_+-]+", name)[0].rstrip("-") for name in needed} <= {
            "libstdc++",
            "libm",
            "libgcc_s",
            "libc",
            "libpthread",
        }
    the_examples_build_and_run(tmp_path, f"-Dsecateur_DIR={cmake_dir}")


def brings_all_headers(folder: Path) -> None:
    headers = ROOT / "csrc" / "include"
    installed = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.h")}
    assert installed.keys() == {str(path.relative_to(headers)) for path in headers.rglob("*.h")}
    # They include one another, and the standard library's, whose names have no dot in C++.
    for name, text in installed.items():
        for included in re.findall(r"#\s*include\s*[<\"](.+)[>\"]", text):
            standard = "." not in included or (name == "secateur.h" and included in ("stddef.h", "stdint.h"))
            assert standard or included in installed, (name, included)


def names_no_folder(package: Path, *folders: Path) -> None:
    for path in package.rglob("*.cmake"):
        for folder in folders:
            assert str(folder) not in path.read_text(), path


def the_examples_build_and_run(tmp_path: Path, where: str) -> None:
    # Away from the source tree, whose targets it must not see.
    source = shutil.copytree(ROOT / "examples" / "embed", tmp_path / "source")
    program = tmp_path / "program"
    run("cmake", "-S", source, "-B", program, where, "-DCMAKE_BUILD_TYPE=Debug")
    run("cmake", "--build", program, "--parallel", 2)
    lines = run(program / "quickstart").splitlines()
    isa = r"(baseline|avx2|avx512|neon)"
    assert re.fullmatch(rf"secateur {re.escape(version())}, {isa}, \d+ threads", lines[0])
    assert lines[1:] == ["query weight (48, 48) -> (36, 48)", "ok"]
    if (program / "prune_vit").exists():
        model = vit()
        sc.save(model, tmp_path / "dense")
        seen = buffers(model, images(3), tmp_path / "buffers")
        run(program / "prune_vit", tmp_path / "dense", seen, tmp_path / "small", "--ffn", 0.5)
        small = sc.load(tmp_path / "small").blocks[1]
        assert (small.attn.qk_dim, small.attn.v_dim, small.mlp.fc1.out_features) == (7, 13, 78)


def version() -> str:
    return re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]


def exports_nothing_else(library: Path) -> None:
    symbols = [line.split()[-1] for line in run("nm", "-D", "--defined-only", library).splitlines()]
    assert [name for name in symbols if not re.match(r"secateur_|_Z(N|NK|TI|TS|TV|TIN|TSN|TVN)8secateur", name)] == []
    declared = set(re.findall(r"\b(secateur_\w+)\(", (ROOT / "csrc" / "include" / "secateur.h").read_text()))
    assert declared == {name for name in symbols if name.startswith("secateur_")}


class Tensor(ctypes.Structure):
    """``secateur_tensor`` of an array, which has to live as long."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("device_type", ctypes.c_int32),
        ("device_index", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("shape", ctypes.c_int64 * 8),
        ("strides", ctypes.c_int64 * 8),
        ("stream", ctypes.c_void_p),
    )

    @classmethod
    def of(cls, array: np.ndarray) -> Tensor:
        dtype = {"float32": 0, "float16": 1, "float64": 3}[array.dtype.name]
        steps = [stride // array.itemsize for stride in array.strides]
        dims = (ctypes.c_int64 * 8)(*array.shape), (ctypes.c_int64 * 8)(*steps)
        return cls(array.ctypes.data, dtype, 0, 0, array.ndim, *dims)


def gives_the_bits_of_python(library: Path) -> None:
    """The C interface from another language, on odd sizes and strided views."""
    c = ctypes.CDLL(str(library))
    c.secateur_error_message.restype = ctypes.c_char_p

    def call(name: str, *arguments: object) -> None:
        assert getattr(c, name)(*arguments) == 0, c.secateur_error_message()

    def pointer(array: np.ndarray) -> ctypes.c_void_p:
        return ctypes.c_void_p(array.ctypes.data)

    def size(value: int) -> ctypes.c_size_t:
        return ctypes.c_size_t(value)

    random = np.random.default_rng(0)
    # Queries, keys and values in one buffer, as a fused projection leaves them.
    qkv = random.standard_normal((5, 17, 3, 2, 11)).astype(np.float32)
    q, k = qkv[:, :, 0], qkv[:, :, 1]
    scorer = ctypes.c_void_p()
    call("secateur_attention_scorer_create", *map(ctypes.c_int64, (2, 11, 8)), 0, b"", ctypes.byref(scorer))
    expected = core.AttentionScorer(2, 11)
    for part in (slice(0, 2), slice(2, 5)):
        views = Tensor.of(q[part]), Tensor.of(k[part])
        call("secateur_attention_scorer_update", scorer, *map(ctypes.byref, views))
        expected.update(q[part], k[part])
    scores = np.empty((2, 11))
    call("secateur_attention_scorer_scores", scorer, pointer(scores), size(scores.size))
    assert np.array_equal(scores, expected.scores())
    assert c.secateur_attention_scorer_scores(scorer, pointer(scores), size(3)) == 1
    assert c.secateur_error_message() == b"size: expected 22, got 3"
    c.secateur_attention_scorer_destroy(scorer)

    kept = np.empty((2, 7), np.int64)
    view = Tensor.of(scores)
    call("secateur_select", ctypes.byref(view), ctypes.c_int64(7), pointer(kept), size(kept.size))
    assert np.array_equal(kept, core.select(scores, 7))

    moments = ctypes.c_void_p()
    x = random.standard_normal((3, 9, 13)).astype(np.float16)
    view = Tensor.of(x)
    call("secateur_moment_accumulator_create", ctypes.c_int64(13), None, ctypes.byref(moments))
    options = ctypes.c_int32(2), ctypes.c_int64(2), ctypes.c_int64(1)
    call("secateur_moment_accumulator_update", moments, ctypes.byref(view), *options)
    total, second = np.empty(13), np.empty((13, 13))
    sizes = size(total.size), size(second.size)
    call("secateur_moment_accumulator_sums", moments, pointer(total), sizes[0], pointer(second), sizes[1])
    accumulator = core.MomentAccumulator(13)
    accumulator.update(x, norm="layer", stride=2, phase=1)
    assert np.array_equal(total, accumulator.sum())
    assert np.array_equal(second, accumulator.second_moment())
    c.secateur_moment_accumulator_destroy(moments)

    rows = random.standard_normal((2, 11, 5)).transpose(0, 1, 2)[:, ::-1]
    view, similar = Tensor.of(rows), np.empty(22)
    call("secateur_value_similarity", ctypes.byref(view), pointer(similar), size(22))
    assert np.array_equal(similar, np.asarray(core.value_similarity(rows)).ravel())

    root = random.standard_normal((9, 9))
    inverse, weights = root @ root.T + np.eye(9), random.standard_normal((9, 4))
    order, costs = np.empty(6, np.int64), np.empty(6)
    views = Tensor.of(inverse), Tensor.of(weights)
    call("secateur_eliminate", *map(ctypes.byref, views), ctypes.c_int64(6), pointer(order), pointer(costs))
    for found, wanted in zip((order, costs), core.eliminate(inverse, weights, 6), strict=True):
        assert np.array_equal(found, wanted)

    weight = random.standard_normal((7, 22)).astype(np.float32)
    wanted = weight[:, kept[1]]
    view = Tensor.of(weight)
    call("secateur_compact", ctypes.byref(view), 1, pointer(kept[1]), size(7))
    assert tuple(view.shape)[:2] == (7, 7)
    assert np.array_equal(weight.ravel()[:49].reshape(7, 7), wanted)


def test_the_package_refuses_another_version(tmp_path: Path) -> None:
    build, prefix = tmp_path / "build", tmp_path / "prefix"
    run("cmake", "-S", ROOT, "-B", build, "-DSECATEUR_CUDA=OFF")
    # Only the version file is asked, so nothing needs to be compiled.
    (prefix / "lib" / "cmake" / "secateur").mkdir(parents=True)
    for name in ("secateurConfig.cmake", "secateurConfigVersion.cmake"):
        shutil.copy(build / name, prefix / "lib" / "cmake" / "secateur")
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.25)\nproject(other LANGUAGES CXX)\n"
        "find_package(secateur 99 CONFIG QUIET)\n"
        'message(STATUS "found ${secateur_FOUND} considered ${secateur_CONSIDERED_VERSIONS}")\n'
    )
    output = run("cmake", "-S", tmp_path, "-B", tmp_path / "other", f"-DCMAKE_PREFIX_PATH={prefix}")
    assert f"found 0 considered {version()}" in output


def configure(folder: Path, languages: str, text: str, *options: str) -> str:
    """What a project prints that adds secateur's folder, or finds its package; nothing is compiled."""
    folder.mkdir()
    (folder / "CMakeLists.txt").write_text(f"cmake_minimum_required(VERSION 3.25)\nproject(other {languages})\n{text}")
    return run("cmake", "-S", folder, "-B", folder / "build", "-DSECATEUR_CUDA=OFF", *options)


def test_a_project_that_adds_the_folder_keeps_its_own_settings(tmp_path: Path) -> None:
    text = (
        f"add_subdirectory({ROOT} secateur)\n"
        "get_target_property(unity secateur UNITY_BUILD)\n"
        "get_target_property(kernels secateur_baseline UNITY_BUILD)\n"
        "message(STATUS \"type '${CMAKE_BUILD_TYPE}' shared '$CACHE{BUILD_SHARED_LIBS}' unity ${unity} ${kernels}\")\n"
        "get_target_property(defined secateur COMPILE_DEFINITIONS)\n"
        'message(STATUS "${defined}")\n'
    )
    # As in the wheel of another project, of another version, that is built in a few large files.
    wheel = ("-DSKBUILD=2", "-DSKBUILD_PROJECT_VERSION=1.2", "-DCMAKE_UNITY_BUILD=ON")
    for name, options in (("plain", ()), ("wheel", wheel)):
        output = configure(tmp_path / name, "LANGUAGES CXX", text, *options)
        assert "type '' shared '' unity OFF OFF" in output
        assert f'SECATEUR_VERSION="{version()}"' in output
    with pytest.raises(AssertionError, match="secateur: expected a project with CXX among its LANGUAGES, got C"):
        configure(tmp_path / "c", "LANGUAGES C", text)


def test_a_static_package_says_that_it_needs_cxx(tmp_path: Path) -> None:
    build = tmp_path / "library"
    for shared in ("OFF", "ON"):
        run("cmake", "-S", ROOT, "-B", build, "-DSECATEUR_CUDA=OFF", f"-DBUILD_SHARED_LIBS={shared}")
        # The targets' file, which is written by an installation, is not reached or not there.
        text = f'find_package(secateur CONFIG PATHS "{build}" NO_DEFAULT_PATH)\nmessage(STATUS "${{secateur_FOUND}}")\n'
        with pytest.raises(AssertionError) as raised:
            configure(tmp_path / shared, "LANGUAGES C", text + "message(FATAL_ERROR stop)")
        assert ("needs CXX among the project's LANGUAGES" in " ".join(str(raised.value).split())) == (shared == "OFF")
