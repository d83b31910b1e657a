"""The command lines `lightning` and `unclip`; of `unclip`, a file per command.

A command has two functions. `add` declares its options and imports no torch, so that `--help`
answers at once. `run` gets the parsed options, imports what it needs, and prints what it wrote.
"""
