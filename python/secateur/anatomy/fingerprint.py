"""Fingerprints that tie statistics and plans to their model; they are compared before anything is cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ..errors import InvalidArgument
from ..files.container import digests
from .anatomy import Anatomy
from .entries import tensor_of


@dataclass(frozen=True)
class Fingerprint:
    """Architecture, arguments, group sizes and the SHA-256 of every parameter that a cut would touch.

    For a model built by hand, the architecture is its class, and there are no arguments. ``tag`` names the weights that
    timm has for the model ("augreg_in1k"); it is no part of what is compared, since the digests are.
    """

    architecture: str
    arguments: Mapping[str, Any]
    sizes: Mapping[str, int]
    digests: Mapping[str, str]
    tag: str | None = field(default=None, compare=False)

    @classmethod
    def of(cls, model: nn.Module, anatomy: Anatomy, *, weights: bool = True) -> Fingerprint:
        """Take the fingerprint of a model; without ``weights`` they are not read and there are no digests.

        Raises:
            InvalidArgument: a parameter without values (the meta device).
        """
        tensors = {name: tensor_of(model, name) for name in anatomy.members_of}
        for name, tensor in tensors.items():
            if tensor.is_meta:
                raise InvalidArgument(f"model: expected weights, got none in {name} (device meta)")
        read = tensors if weights else {}
        return replace(cls.without_weights(anatomy), digests=digests(read), tag=_tag(model))

    @classmethod
    def without_weights(cls, anatomy: Anatomy) -> Fingerprint:
        """Return the fingerprint of the model's structure, without digests of its weights."""
        arguments = {name: _plain(value) for name, value in sorted(anatomy.arguments.items())}
        return cls(anatomy.architecture, arguments, anatomy.fixed_sizes, {})

    def require(self, other: Fingerprint, what: str, *, strict: bool) -> None:
        """Refuse a different model.

        Args:
            other: the fingerprint that was found.
            what: the argument it belongs to, for the message.
            strict: if false, weights may differ as long as their dimensions are the same.

        Raises:
            InvalidArgument: they differ; the text names the first difference.
        """
        difference = self._difference(other, strict)
        if difference:
            raise InvalidArgument(f"{what}: expected the same model, got {difference}")

    def _difference(self, other: Fingerprint, strict: bool) -> str | None:
        if self.architecture != other.architecture:
            return f"architecture {other.architecture!r} where it was {self.architecture!r}"
        for kind, mine, found in (
            ("argument", self.arguments, other.arguments),
            ("size of group", self.sizes, other.sizes),
            *((("weights of", self.digests, other.digests),) if strict else ()),
        ):
            for name in sorted({*mine, *found}):
                if mine.get(name) != found.get(name):
                    if kind == "weights of":
                        return f"other weights of {name}"
                    return f"{kind} {name} = {found.get(name)} where it was {mine.get(name)}"
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return the fingerprint as JSON values."""
        return {
            "architecture": self.architecture,
            "arguments": dict(self.arguments),
            "sizes": dict(self.sizes),
            "digests": dict(self.digests),
            # Files without it are those of versions that know none.
            **({} if self.tag is None else {"tag": self.tag}),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Fingerprint:
        """Build a fingerprint from its JSON values.

        Raises:
            KeyError: a field is missing.
            TypeError: a field has another type.
        """
        for name, kind in (("architecture", str), ("arguments", dict), ("sizes", dict), ("digests", dict)):
            if not isinstance(fields[name], kind):
                raise TypeError(f"{name} of type {type(fields[name]).__name__} in the fingerprint")
        tag = fields.get("tag")
        if not isinstance(tag, (str, type(None))):
            raise TypeError(f"tag of type {type(tag).__name__} in the fingerprint")
        return cls(fields["architecture"], fields["arguments"], fields["sizes"], fields["digests"], tag)


def _tag(model: nn.Module) -> str | None:
    """Return timm's name of the weights that belong to the model's configuration; None for those of a hub or folder."""
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    tag = None if config.get("source") in ("hf-hub", "local-dir") else config.get("tag")
    return tag if isinstance(tag, str) and tag else None


def _plain(value: Any) -> Any:
    """Return a value as it would come back from JSON; what JSON cannot hold becomes its representation."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    name = getattr(value, "__qualname__", None) or getattr(type(value), "__qualname__", "object")
    return f"<{name}>"
