"""What the repository is worked on with."""
