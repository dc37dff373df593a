"""The ``rgfast`` command: a file a subcommand, and what they share."""
