"""Training by several processes of torchrun: sharded weights, and rows whose tokens are shared."""
