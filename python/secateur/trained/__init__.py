"""Methods that learn what to remove while the model is trained: hooks of the training loop that end in a plan."""
