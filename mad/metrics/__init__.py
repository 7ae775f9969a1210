"""Pure metrics on arrays and tensors."""
