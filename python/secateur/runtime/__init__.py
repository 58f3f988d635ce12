"""The process: ranks of a job, random generators, devices, and the progress bar."""
