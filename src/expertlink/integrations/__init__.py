"""Plug-ins for frameworks that have a socket for expert parallelism. A module each.

Importing this package imports no framework. Programs that call `deep_ep` need none of it: see
`expertlink.compat.deep_ep`.
"""
