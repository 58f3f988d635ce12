"""Programs that tests start."""

from __future__ import annotations

import subprocess


def run(*command: object) -> str:
    """Run a command that has to succeed, and return what it prints."""
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout
