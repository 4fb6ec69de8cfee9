"""Functions of one device's share of the data, called inside `jax.shard_map`. One way to split, one file."""
