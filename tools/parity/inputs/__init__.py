"""What a parity run is run on: prompts, rows with labels, images."""
