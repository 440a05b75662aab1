"""A study: one YAML of episodes under conditions, run on as many processes or machines as there are, kept as two tables."""
