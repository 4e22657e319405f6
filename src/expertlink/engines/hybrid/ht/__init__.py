"""High-throughput mode across hosts: chunks of tokens, on rails and inside hosts."""
