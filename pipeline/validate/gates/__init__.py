"""What is compared, gate by gate, and within which limits. Shows nothing."""
