"""The commands, one a file; the rooms below hold what they are made of, and no part imports a command."""
