"""What a program needs, read from its compiled text."""
