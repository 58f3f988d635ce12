"""Handlers: what methods do with each kind of group."""
