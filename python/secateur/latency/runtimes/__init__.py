"""Engines that run what is timed, one module each."""
