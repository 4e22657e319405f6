"""Device code, as package data: CUDA C++ without torch or CUDA-toolkit headers."""
