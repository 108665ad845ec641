"""The files of a training run: metrics, samples, checkpoints."""
