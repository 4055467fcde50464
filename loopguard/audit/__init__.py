"""The evidence: a log that can be appended to, read, verified, and explained."""
