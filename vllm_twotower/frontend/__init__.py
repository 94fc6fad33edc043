"""Everything that can refuse a user: the flag, the start-up rules, the checkpoint, each request."""
