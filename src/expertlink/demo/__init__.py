"""The demo: a small byte-level MoE language model, trained with expert parallelism on real text."""
