"""Describes a model for pruning: what can be removed, what is tied to it, and what it costs."""

from .anatomy import Anatomy
from .entries import kept_along_axes, tensor_of
from .groups import Group, Indices, Member, Part, Role, parameter_name, shared_entries, unit_entries
from .kinds import KINDS, Kind
from .layers import LastBlock, Layer, Layout, NormSite, Source, Stream, Tap

__all__ = [
    "KINDS",
    "Anatomy",
    "Group",
    "Indices",
    "Kind",
    "LastBlock",
    "Layer",
    "Layout",
    "Member",
    "NormSite",
    "Part",
    "Role",
    "Source",
    "Stream",
    "Tap",
    "kept_along_axes",
    "parameter_name",
    "shared_entries",
    "tensor_of",
    "unit_entries",
]
