"""Rows of files as people have them: JSON lines, JSON, CSV, TSV and Parquet, by the names that the kit knows."""
