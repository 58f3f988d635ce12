"""Scripts on several ranks: torchrun's environment without its agent, which would end the others for us."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

__all__ = ["SUPPORT", "on_ranks", "start_ranks"]

# What scripts of tests import besides secateur.
SUPPORT = Path(__file__).parent


def start_ranks(script: str, folder: Path, ranks: int = 2, **environment: str) -> list[subprocess.Popen[str]]:
    """Start a script, whose first argument is the folder, on every rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        **environment,
    }
    command = [sys.executable, "-W", "error", "-c", script, str(folder)]
    return [
        subprocess.Popen(
            command,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


def on_ranks(
    script: str, folder: Path, ranks: int = 2, timeout: float = 300, **environment: str
) -> list[tuple[int, str]]:
    """Run a script on all ranks; return their exit codes and what they wrote on stderr."""
    running = start_ranks(script, folder, ranks, **environment)
    try:
        texts = [each.communicate(timeout=timeout)[1] for each in running]
    finally:
        for each in running:
            each.kill()
            each.wait()
    return [(each.returncode, text) for each, text in zip(running, texts, strict=True)]
