"""One command of `fairseq-qn` a file: its `run`, with the arguments that cli.py declares."""
