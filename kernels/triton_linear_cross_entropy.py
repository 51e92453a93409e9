"""Placeholder."""

is_available = False


def statistics(shard): ...
def gradients(*a): ...
