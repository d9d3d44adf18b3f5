"""The command line: one module per group of commands, imported when one of its commands is called.

A command parses its options, calls one function of another room and shows the result. Only this room prints or exits.
Entered by no room; `cli.main` is the entry point of `tandem`.
"""
