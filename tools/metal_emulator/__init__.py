"""An emulator of Metal kernels for a Linux CPU; README.md beside this file explains it."""
