"""Plans: which units stay, what the weights become, and the cut itself."""
