"""The results of a study: statistics, summary, tables, plots and pages."""
