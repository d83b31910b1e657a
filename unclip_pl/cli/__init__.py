"""The subcommands of `unclip`, a file for each family. Each parses, calls, prints; `add` needs no torch, `run_*` imports it late."""
