"""Names of the files that training keeps in a run folder beside the checkpoint."""

from __future__ import annotations

# The settings of the run: a TrainConfig as JSON.
TRAINING = "training.json"
# Weights and optimizer moments of the last save, to resume from.
STATE = "training_state.safetensors"
# One JSON object a line for every step and every evaluation, and its picture.
METRICS = "metrics.jsonl"
LOSS_PICTURE = "loss.png"
# Measures on the test examples of a task, written when the run is finished.
RESULT = "result.json"
