"""Slides: scale, pixels, tissue, annotations, and the synthetic cohort. Knows no torch."""
