"""Endpoints: chat completions over HTTP, as a client that asks and as a server that answers."""
