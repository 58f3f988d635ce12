"""Bytes on disk: the container of every file, its reader, and JSON documents. Nothing here knows a model."""
