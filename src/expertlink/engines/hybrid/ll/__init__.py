"""Low-latency calls across hosts: messages on the rails, kernels of `nvlink` inside the hosts."""
