"""On PYTHONPATH, it has every Python of a test run import the extension that SECATEUR_CORE names."""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec


class _Core:
    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != "secateur._core":
            return None
        return importlib.util.spec_from_file_location(name, os.environ["SECATEUR_CORE"])


sys.meta_path.insert(0, _Core)  # before the finder of an editable install
