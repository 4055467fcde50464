"""Reference loops that run: each a package, guarded from its first update to its last promotion."""
