"""Errors of other libraries and of the system, as the one line that a user can act on."""

from __future__ import annotations

# Words of the RuntimeError by which PyTorch, CUDA, MLX and ONNX Runtime report missing memory.
MEMORY_WORDS = (
    "out of memory",
    "allocate memory",
    "unable to allocate",
    "malloc",
    "bad allocation",
)


def foreign_message(error: BaseException) -> str | None:
    """The line for an error that is no fault of the program, None for all others."""
    if isinstance(error, MemoryError):
        return f"not enough memory: {error}"
    if isinstance(error, OSError):
        # A disk that is full, a folder that may not be written.
        return f"{error.filename or 'input or output'}: {error.strerror or error}"
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):
        return str(error)
    if isinstance(error, RuntimeError) and any(w in str(error).lower() for w in MEMORY_WORDS):
        return f"not enough memory: {str(error).partition(chr(10))[0]}"
    # A panic in a library that is written in Rust; its class can be imported from nowhere.
    if type(error).__name__ == "PanicException":
        return f"a library failed on this input ({error})"
    return None
