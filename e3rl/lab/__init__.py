"""The lab: a tiny model that comes with the package, and procedural problems that it half solves."""
