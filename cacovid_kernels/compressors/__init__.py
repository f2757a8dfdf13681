"""Published ways to choose video tokens without training, expressed on the ops."""
