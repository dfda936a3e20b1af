"""What `adalink bench` measures."""
