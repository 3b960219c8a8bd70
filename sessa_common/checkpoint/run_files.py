"""Names of the files that training keeps in a run folder beside the checkpoint."""

from __future__ import annotations

# The settings of the run: a TrainConfig as JSON.
TRAINING = "training.json"
# Weights and optimizer moments of the last save, to resume from.
STATE = "training_state.safetensors"
# Step and data of a state in shards, each of which one process has written.
STATE_INDEX = "training_state.json"
# One JSON object a line for every step and every evaluation, and its picture.
METRICS = "metrics.jsonl"
LOSS_PICTURE = "loss.png"
# What a profiled run measured of a step, and the trace of its kernels for a browser.
PROFILE, TRACE = "profile.json", "trace.json.gz"
# Measures on the test examples of a task, written when the run is finished.
RESULT = "result.json"

# The chat template of a model, where its tokenizer_config.json has none.
CHAT_TEMPLATE = "chat_template.jinja"
# Files about the tokenizer, which fine-tuning takes over as they are.
TOKENIZER_FILES = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    CHAT_TEMPLATE,
)
# The kind of an adapter and the model that it is for, beside its weights.
ADAPTER_CONFIG = "adapter_config.json"
# What trackers keep: TensorBoard's events, wandb's files, and the name of the run there.
TENSORBOARD, WANDB, TRACKING = "tensorboard", "wandb", "tracking.json"
