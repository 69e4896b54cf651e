"""A user's examples: reading, validating and splitting them. Needs neither torch nor transformers."""
