"""What all verbs of the command line share: their options, where values come from, and how answers are given."""
