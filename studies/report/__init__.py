"""What a study found: figures, tables, plots and pages."""
