"""Exports models to files: secateur's own format, and formats of other engines."""
