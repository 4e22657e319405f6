"""High-throughput mode: thousands of tokens, for training and prefill."""
