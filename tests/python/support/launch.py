"""Scripts in processes of their own, and on several ranks: torchrun's environment without its agent.

Importing torch, timm and secateur takes longer than most scripts. One process, which does nothing else and computes
nothing, imports them and forks for every script. A script that is about imports is to start an interpreter instead.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["SUPPORT", "Script", "on_ranks", "run_script", "start_ranks"]

# What scripts of tests import besides secateur.
SUPPORT = Path(__file__).parent


class Script:
    """A script that runs, with as much of the interface of `subprocess.Popen` as tests need."""

    def __init__(self, script: str, *arguments: object, **environment: str) -> None:
        # Files, not pipes: nobody has to read while a script writes much.
        self._files = [tempfile.NamedTemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
        names = [file.name for file in self._files]
        words = ["-c", *map(str, arguments)]
        self.pid: int = _ask("start", script, words, {**os.environ, **environment}, str(Path.cwd()), *names)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _ask("poll", self.pid)
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("a script", timeout)
            time.sleep(0.01)
        return self.returncode

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Wait, and return what was written on stdout and stderr."""
        self.wait(timeout)
        for file in self._files:
            file.seek(0)
        return self._files[0].read(), self._files[1].read()

    def kill(self) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


def run_script(script: str, *arguments: object, timeout: float = 300, **environment: str) -> tuple[int, str, str]:
    """Run to the end; return the exit code, and what was written on stdout and stderr."""
    running = Script(script, *arguments, **environment)
    try:
        out, errors = running.communicate(timeout)
    finally:
        running.kill()
    return running.returncode, out, errors


def start_ranks(script: str, folder: Path, ranks: int = 2, **environment: str) -> list[Script]:
    """Start a script, whose first argument is the folder, on every rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **environment}
    return [Script(script, folder, **shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(ranks)]


def on_ranks(
    script: str, folder: Path, ranks: int = 2, timeout: float = 300, **environment: str
) -> list[tuple[int, str]]:
    """Run a script on all ranks; return their exit codes and what they wrote on stderr."""
    running = start_ranks(script, folder, ranks, **environment)
    try:
        texts = [each.communicate(timeout)[1] for each in running]
    finally:
        for each in running:
            each.kill()
    return [(each.returncode, text) for each, text in zip(running, texts, strict=True)]


@functools.cache
def _server() -> subprocess.Popen[str]:
    path = os.pathsep.join([str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")])])
    server = subprocess.Popen(
        [sys.executable, "-W", "error", str(Path(__file__))],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.communicate)  # the end of its input is its own
    return server


def _ask(*question: object) -> Any:
    server = _server()
    server.stdin.write(json.dumps(question) + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


def _serve() -> str | None:
    """Answer until the input ends: None; in a forked process: the script that it is to run."""
    done: dict[int, int] = {}
    while question := sys.stdin.readline():
        task, *details = json.loads(question)
        if task == "start":
            script, words, environment, folder, out, errors = details
            answer = os.fork()
            if answer == 0:
                for number, (name, flags) in enumerate(
                    [(os.devnull, os.O_RDONLY), (out, os.O_WRONLY), (errors, os.O_WRONLY)]
                ):
                    os.dup2(os.open(name, flags), number)
                os.chdir(folder)
                os.environ.clear()
                os.environ.update(environment)
                sys.argv = words
                return script
        else:
            (pid,) = details
            if pid not in done:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    done[pid] = os.waitstatus_to_exitcode(status)
            answer = done.get(pid)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    return None


def _run(script: str) -> NoReturn:
    """Run and exit, without taking down what was imported, object by object: that would take a second."""
    code = 1
    try:
        exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            sys.stderr.write(end.code + "\n")
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    import finetuning  # noqa: F401
    import secateur
    import sklearn.datasets  # noqa: F401
    import timm  # noqa: F401
    import torch.distributed  # noqa: F401

    for _name in secateur.__all__:
        getattr(secateur, _name)  # imported when asked for
    if (_script := _serve()) is not None:
        _run(_script)
