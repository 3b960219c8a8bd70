"""Shared by the CUDA kernels: launching, device properties, tile operations, rotary positions."""
