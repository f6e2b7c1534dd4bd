"""From PyTorch weights to this library's parameters, and back."""
