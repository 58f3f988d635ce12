"""Scripts in processes of their own, and on several ranks: torchrun's environment without its agent.

Importing torch, timm and secateur takes longer than most scripts. One process, which does nothing else and computes
nothing, imports them and forks for every script. Where it matters that secateur has not been imported, such as for
code of its users, a script is `fresh`: forked from a process that has torch and timm alone. A script that is about
their imports is to start an interpreter instead.
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
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

__all__ = ["SUPPORT", "Script", "on_ranks", "run_script", "start_ranks"]

# What scripts of tests import besides secateur.
SUPPORT = Path(__file__).parent


class Script:
    """A script that runs, with as much of the interface of `subprocess.Popen` as tests need."""

    def __init__(self, script: str, *arguments: object, fresh: bool = False, **environment: str) -> None:
        # Files, not pipes: nobody has to read while a script writes much.
        self._files = [tempfile.NamedTemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
        names = [file.name for file in self._files]
        words = ["-c", *map(str, arguments)]
        self.pid: int = _ask(
            "fresh" if fresh else "start", script, words, {**os.environ, **environment}, str(Path.cwd()), *names
        )
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


def run_script(
    script: str, *arguments: object, timeout: float = 300, fresh: bool = False, **environment: str
) -> tuple[int, str, str]:
    """Run to the end; return the exit code, and what was written on stdout and stderr."""
    running = Script(script, *arguments, fresh=fresh, **environment)
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


class _Forks:
    """Forks of this process, and the exit codes of those that ended."""

    def __init__(self) -> None:
        self._ended: dict[int, int | None] = {}

    def start(self, words: list[str], environment: dict[str, str], folder: str, out: str, errors: str) -> int:
        """Return the process id; 0 in the fork, whose streams, folder and arguments are the script's."""
        pid = os.fork()
        if pid:
            self._ended[pid] = None
            return pid
        for number, (name, flags) in enumerate([(os.devnull, os.O_RDONLY), (out, os.O_WRONLY), (errors, os.O_WRONLY)]):
            os.dup2(os.open(name, flags), number)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = words
        return 0

    def __contains__(self, pid: int) -> bool:
        return pid in self._ended

    def poll(self, pid: int) -> int | None:
        if self._ended[pid] is None:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self._ended[pid] = os.waitstatus_to_exitcode(status)
        return self._ended[pid]


def _serve(questions: TextIO, answers: TextIO, ask: Callable[[str], str] | None = None) -> str | None:
    """Answer until the input ends: None; in a forked process: the script that it is to run.

    What ``ask`` is given goes to the process that has imported secateur; without it, this is that process.
    """
    forks = _Forks()
    while question := questions.readline():
        task, *details = json.loads(question)
        if task in ("start", "fresh"):
            if ask is None or task == "fresh":
                script, *rest = details
                pid = forks.start(*rest)
                if pid == 0:
                    return script
                answer = json.dumps(pid) + "\n"
            else:
                answer = ask(question)
        elif details[0] in forks or ask is None:
            answer = json.dumps(forks.poll(*details)) + "\n"
        else:
            answer = ask(question)
        answers.write(answer)
        answers.flush()
    return None


def _main() -> str | None:
    """Have a fork import secateur, and serve; the script to run in every process that is forked for one."""
    import sklearn.datasets
    import sklearn.model_selection  # noqa: F401
    import timm  # noqa: F401
    import torch.distributed  # noqa: F401

    there, back = os.pipe(), os.pipe()
    if os.fork():
        os.close(there[0])
        os.close(back[1])
        # Closed in what is forked for a script, too.
        with os.fdopen(there[1], "w") as questions, os.fdopen(back[0]) as answers:

            def ask(question: str) -> str:
                questions.write(question)
                questions.flush()
                return answers.readline()

            return _serve(sys.stdin, sys.stdout, ask)
    os.close(there[1])
    os.close(back[0])
    import finetuning  # noqa: F401
    import secateur

    for name in secateur.__all__:
        getattr(secateur, name)  # imported when asked for
    with os.fdopen(there[0]) as questions, os.fdopen(back[1], "w") as answers:
        return _serve(questions, answers)


def _run(script: str) -> NoReturn:
    """Run and exit, without taking down what was imported, object by object: that would take a second."""
    code = 1
    # As in pyproject.toml: small models are calibrated on a few images.
    warnings.filterwarnings("ignore", "stats: [0-9,]+ images are few", UserWarning)
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
    if (_script := _main()) is not None:
        _run(_script)
