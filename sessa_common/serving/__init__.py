"""Serving: continuous batching, and the OpenAI-compatible server over it."""
