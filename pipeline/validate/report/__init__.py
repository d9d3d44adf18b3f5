"""The results of the gates as data, page, Markdown and JUnit. Judges nothing; imports no torch."""
