"""Backbones, heads, encoders and their files."""
