"""The hybrid engine: NVLink inside hosts, rails between them."""
