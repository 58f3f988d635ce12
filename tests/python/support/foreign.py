"""What is not a bare timm model: networks around one, classes of other libraries, and what `inspect` says of them."""

from __future__ import annotations

import pytest
import secateur as sc
from torch import nn


class Net(nn.Module):
    """A network of these parts."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return next(self.children())(x)


def refusal(model):
    """The text of `inspect`, after the part that is the same for every class; always a single line."""
    with pytest.raises(sc.Unsupported) as caught:
        sc.inspect(model)
    text = str(caught.value)
    assert "\n" not in text
    return text.rpartition(", by exact class, got ")[2]


def named(module, name, *bases):
    """A class that says it is another library's."""
    return type(name, bases or (nn.Module,), {"__module__": module, "__qualname__": name})
