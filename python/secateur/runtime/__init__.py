"""The process: ranks of a job, random generators, devices, the progress bar."""
