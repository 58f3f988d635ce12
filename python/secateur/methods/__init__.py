"""Pruning methods, one module each: criteria that select, and closed forms that change weights."""
