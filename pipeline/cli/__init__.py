"""The command line: one module a group of commands, each loaded when its command is called.

Parses, calls one function, renders. Only this room prints or exits. Nothing imports it.
"""
