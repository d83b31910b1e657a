"""The command lines `lightning` and `unclip`; of `unclip`, a file per command.

A command is a function: its parameters are the options and its docstring is their help
(`unclip_pl.utils.commands`). Its module imports no torch, so that `--help` answers at once; the
function imports what it needs, and prints what it wrote.
"""

from unclip_pl.utils.interrupts import quiet_imports

quiet_imports()
