"""Training a pruned model on unlabelled images until it computes what the dense one does."""
