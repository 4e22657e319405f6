"""Long mixed runs: everything that may follow each other does.

All ranks draw the same calls from a shared seed, and each its own delays. Results are compared on
the GPU and looked at in intervals, so that the host runs ahead as it does in a model.

`settings` has the communicators, `items` what must come of their inputs, `lines`, `low_latency`,
`training` and `graphs` every kind of call with its checks, `runs` the order that a seed draws.
"""
