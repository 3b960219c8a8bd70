"""Models of the Hugging Face hub, as folders of its cache on this machine."""

from __future__ import annotations

from pathlib import Path

from sessa_common.errors import SessaError, expect

PREFIX = "hf:"
# Neither programs nor pickled weights are fetched.
FILES = ("*.safetensors", "*.json", "*.jinja")


def local_source(source: Path | str) -> Path:
    """Return the folder of "hf:owner/name" or "hf:owner/name@revision"; other paths as they are.

    The weights (safetensors), settings and tokenizer are fetched where the hub's cache lacks them.
    Raises SessaError when the hub cannot be reached or does not have the model.
    """
    text = str(source)
    if not text.startswith(PREFIX):
        return Path(source)
    name, _, revision = text.removeprefix(PREFIX).partition("@")
    parts = name.split("/")
    expect(len(parts) == 2 and all(parts), "`source`", text, "hf:owner/name, or a path")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision or None, allow_patterns=list(FILES)
        )
    except LocalEntryNotFoundError:
        raise SessaError(
            f"{text}: the hub cannot be reached, and its cache here does not have the model; "
            "download the folder elsewhere and give its path"
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SessaError(f"{text}: {reason}") from None
    return Path(folder)
