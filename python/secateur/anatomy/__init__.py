"""What can be cut out of a model, what is tied to it, and what it costs."""
