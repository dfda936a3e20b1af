"""What `adalink doctor` tries."""
