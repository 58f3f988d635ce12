"""Latency of a model: timing, tables of layer times, and predictions from them."""
