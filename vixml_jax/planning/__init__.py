"""What a run needs, known before it starts: its programs are compiled from shapes, and their text is read."""
