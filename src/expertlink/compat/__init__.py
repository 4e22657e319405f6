"""Drop-ins for other libraries' modules, on top of the public API."""
