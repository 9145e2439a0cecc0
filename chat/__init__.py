"""Talking to a checkpoint, in the terminal or through an OpenAI-compatible endpoint."""
