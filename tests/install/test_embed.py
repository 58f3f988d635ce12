"""cmake --install, and a C++ program elsewhere that finds and uses what was installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command: object) -> str:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.mark.parametrize("shared", ["OFF", "ON"])
def test_an_installed_library_embeds(tmp_path: Path, shared: str) -> None:
    build, prefix, program = tmp_path / "build", tmp_path / "prefix", tmp_path / "program"
    # How fast it is matters elsewhere; this compiles in half the time.
    quick = ("-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_CXX_FLAGS_RELEASE=-O1 -DNDEBUG")
    run("cmake", "-S", ROOT, "-B", build, *quick, f"-DBUILD_SHARED_LIBS={shared}")
    run("cmake", "--build", build, "--parallel", 2)
    run("cmake", "--install", build, "--prefix", prefix)
    assert {path.name for path in (prefix / "include" / "secateur").iterdir()} == {
        path.name for path in (ROOT / "csrc" / "include" / "secateur").iterdir()
    }
    # The installed package has to stand alone, and may be moved.
    shutil.rmtree(build)
    moved = prefix.rename(tmp_path / "moved")
    for path in moved.rglob("*.cmake"):
        assert str(ROOT) not in path.read_text(), path

    # Away from the source tree, whose targets it must not see.
    source = shutil.copytree(ROOT / "examples" / "embed", tmp_path / "source")
    run("cmake", "-S", source, "-B", program, f"-DCMAKE_PREFIX_PATH={moved}", "-DCMAKE_BUILD_TYPE=Release")
    run("cmake", "--build", program)
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    lines = run(program / "embed").splitlines()
    assert re.fullmatch(rf"secateur {re.escape(version)}, (baseline|avx2|avx512|neon), \d+ threads", lines[0])
    assert lines[1:] == ["query weight (48, 48) -> (36, 48)", "ok"]


def test_the_package_refuses_another_version(tmp_path: Path) -> None:
    build, prefix = tmp_path / "build", tmp_path / "prefix"
    run("cmake", "-S", ROOT, "-B", build)
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
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert f"found 0 considered {version}" in output
