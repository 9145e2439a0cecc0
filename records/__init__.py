"""What a run leaves behind: checkpoints, metrics, dialogues, curves, and the perplexity of held-out text."""
