"""The commands of the command line: a dataclass each, whose fields are the options."""
