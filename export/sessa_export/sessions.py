"""ONNX Runtime sessions of an exported model, on the CPU or on a CUDA device."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from sessa_common.errors import SessaError

# Keys of the model's own metadata: its configuration as JSON, and the dtype of its weights.
CONFIG_KEY, DTYPE_KEY = "sessa_config", "sessa_dtype"
# Rows that the body for a GPU solves at once. On an H200 a prompt of 2048 tokens took 1.33 times as
# long in blocks of 1024 rows, because two blocks need a loop and twice the nodes.
LARGE_BLOCK = 2048
CUDA = "CUDAExecutionProvider"
INSTALL_CUDA = (
    "install `onnxruntime-gpu[cuda,cudnn]` in place of `onnxruntime`, for the CUDA version that "
    "its page names"
)
# ONNX Runtime's number for the messages of errors.
ERRORS = 3
EXTERNAL_DATA_FOLDER = "session.model_external_initializers_file_folder_path"


def open_session(
    path: Path,
    *,
    threads: int = 0,
    native: bool = False,
    device: str | None = None,
    tf32: bool = False,
) -> Any:
    """Open a session on "cpu" (the default), "cuda" or "cuda:1".

    `threads` 0 leaves the number of threads to the runtime. `native` uses the operator that
    `sessa_export.native.build` compiled on this machine, for CUDA the one with CUDA kernels. A
    library in the folder is never loaded, because it is code of whoever published the folder.
    `tf32` lets CUDA round the factors of matrix products to 11 bits. Raises SessaError for another
    device, without CUDA, and for a model that does not load.
    """
    import onnxruntime

    number = _cuda_device(device)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    model: str | bytes = str(path)
    if native:
        from sessa_export.native import register

        register(options, cuda=number is not None)
    elif number is not None:
        model = model_for_gpu(path)
        options.add_session_config_entry(EXTERNAL_DATA_FOLDER, str(path.parent.absolute()))
    providers: list[Any] = ["CPUExecutionProvider"]
    if number is not None:
        _require_cuda(onnxruntime)
        # Below errors it reports every copy between processor and device that a session will make.
        options.log_severity_level = ERRORS
        onnxruntime.set_default_logger_severity(ERRORS)
        providers.insert(0, (CUDA, {"device_id": str(number), "use_tf32": str(int(tf32))}))
    try:
        session = onnxruntime.InferenceSession(model, options, providers=providers)
    except Exception as error:  # the binding raises one class per status, all plain Exceptions
        raise SessaError(f"{path}: ONNX Runtime cannot load it ({error})") from None
    if number is not None and CUDA not in session.get_providers():
        raise SessaError(
            f"ONNX Runtime cannot use CUDA device {number} (see above); {INSTALL_CUDA}"
        )
    return session


def device_of(session: Any) -> str:
    """The device that a session computes on, as ONNX Runtime's bindings name it: cpu or cuda:0."""
    if CUDA not in session.get_providers():
        return "cpu"
    number = session.get_provider_options()[CUDA].get("device_id", "0")
    return f"cuda:{number}"


def _cuda_device(device: str | None) -> int | None:
    """The number of the CUDA device, None for the CPU."""
    if device in (None, "cpu"):
        return None
    found = re.fullmatch(r"cuda(?::(\d+))?", str(device))
    if found is None:
        raise SessaError(f"device is {device!r}; ONNX Runtime runs on cpu, cuda or cuda:1 here")
    return int(found.group(1) or 0)


def _require_cuda(onnxruntime: Any) -> None:
    """Raise SessaError unless this onnxruntime was built with CUDA; load the libraries it needs."""
    if CUDA not in onnxruntime.get_available_providers():
        raise SessaError(
            f"onnxruntime {onnxruntime.__version__} has no CUDA provider; {INSTALL_CUDA}"
        )
    # Finds the CUDA libraries of Python packages, which the system does not look for.
    onnxruntime.preload_dlls()


def model_for_gpu(path: Path) -> bytes:
    """The model in its form for a GPU; a model without the operator as it is."""
    import onnx

    from sessa_common.config import SessaConfig
    from sessa_export.gpu_graph import for_gpu

    model = onnx.load(path, load_external_data=False)
    configs = [item.value for item in model.metadata_props if item.key == CONFIG_KEY]
    if configs:
        config = SessaConfig.from_dict(json.loads(configs[0]), str(path))
        for_gpu(model, LARGE_BLOCK, config.feedback_key_dim)
    return model.SerializeToString()
