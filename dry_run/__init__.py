"""What `--dry-run` counts before anything is loaded: memory per device, tokens and calls of a run."""
