"""The programs `play` and `train`: each parses its options and hands over."""
