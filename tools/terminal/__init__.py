"""What people see of a verb on a terminal: lines, tables, progress, Ctrl-C."""
