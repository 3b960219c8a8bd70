"""Checkpoint folders: reading, writing, converting, quantising and inspecting weights."""
