"""What the gates found, as data, page, Markdown and JUnit. Judges nothing; imports no torch."""
