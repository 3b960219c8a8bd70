"""Metal kernels on a Linux CPU; README.md beside this says how and what for."""
