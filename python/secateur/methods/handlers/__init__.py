"""What methods do with each kind of group."""
