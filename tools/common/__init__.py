"""Console, options and reports shared by the commands."""
