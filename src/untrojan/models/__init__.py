"""Architectures by family, feature taps and checkpoints."""
