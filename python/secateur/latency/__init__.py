"""How long a model takes: timing, tables of layer times, and what they predict."""
