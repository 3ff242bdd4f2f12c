"""The programs: each parses its options and hands over."""
