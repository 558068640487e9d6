"""AR-Omni in JAX: one autoregressive decoder that reads and writes text, pictures and speech."""

__version__ = "0.1.0"
