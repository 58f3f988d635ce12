"""Models written to files: secateur's own format, and formats of other engines."""
