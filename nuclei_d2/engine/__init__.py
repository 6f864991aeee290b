"""Training: what happens before it, the trainer, its hooks and its checkpoints."""
