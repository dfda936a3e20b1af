"""A whole study: which runs it has, doing them, and what they say."""
