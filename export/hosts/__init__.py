"""Tasks in the formats of other engines and servers."""
