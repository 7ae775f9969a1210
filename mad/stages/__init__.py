"""The eight stages: each reads files, calls the rooms below, writes files."""
