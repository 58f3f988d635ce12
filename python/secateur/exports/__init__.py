"""Exports models to files: secateur's own format, and formats of other engines."""

from .base import Exporter, ExportReport, register

__all__ = ["ExportReport", "Exporter", "register"]
