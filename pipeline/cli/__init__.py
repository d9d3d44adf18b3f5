"""The command line: one module a group of commands, each imported when one of its commands is called.

A command parses its options, calls one function of another room, and shows the result. Only this room prints or exits.
No other room imports it.
"""
