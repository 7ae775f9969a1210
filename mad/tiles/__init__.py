"""Aligned tiles: the index (i, j, k, m), labels, selection, shards. Knows no torch."""
