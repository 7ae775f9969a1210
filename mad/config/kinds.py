"""Kinds of samples, as shards and `mix` name them: "10x-40x", "2.5x-10x-40x", "standalone"."""

STANDALONE = "standalone"


def is_triple(kind: str) -> bool:
    """Whether a kind spans three magnifications, as "2.5x-10x-40x"."""
    return kind.count("-") == 2
