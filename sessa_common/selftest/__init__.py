"""Checks of a framework on the present machine: the solve, training, decoding, memory, 4 bits."""
