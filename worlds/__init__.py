"""The embedded worlds: people without a model, a network or a key."""
