"""Low-latency mode: a few tokens, for decode, in CUDA graphs."""
