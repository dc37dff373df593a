"""What the process runs on: the compiled module, threads, the environment."""
