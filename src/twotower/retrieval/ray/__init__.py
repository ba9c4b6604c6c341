"""An index in shards on the nodes of a Ray cluster."""
