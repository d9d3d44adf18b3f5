"""Serving integrations."""
