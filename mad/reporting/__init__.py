"""Tables, figures and pictures of quality control."""
