"""Files: the container of every file, its reader, and JSON documents. Nothing here knows about models."""
