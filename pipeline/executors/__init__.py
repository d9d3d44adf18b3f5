"""Where compile jobs run."""
