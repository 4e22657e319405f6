"""The nvlink engine: kernels that load and store the memory of other GPUs directly."""
