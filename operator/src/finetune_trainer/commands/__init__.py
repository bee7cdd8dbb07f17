"""One module per subcommand of `finetune-trainer`: its arguments, and the story of its run.

`__main__` imports a module only when its command is asked for. A module imports torch inside `run`, never at its top,
so that `--help` is quick and works without it.
"""
