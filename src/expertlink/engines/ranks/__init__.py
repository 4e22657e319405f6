"""What ranks say to each other through their hosts, for every engine.

handshake.py runs once, when a communicator starts. Before calls, ranks exchange headers (header.py)
and reach one verdict (agreement.py, capacity.py). wire.py carries both, within a time-out, and says
who is missing when a wait fails (status.py). metadata.py packs what travels with a row.
"""
