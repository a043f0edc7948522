"""Text from a model: sampling, the engine, and the public `Model`."""
