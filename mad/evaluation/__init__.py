"""The protocols of the papers."""
