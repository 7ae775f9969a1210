"""mad: gigapixel slides into encoders that see the same tissue the same way at every magnification."""

__version__ = "0.1.0"
