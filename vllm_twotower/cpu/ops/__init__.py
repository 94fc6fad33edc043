"""The C++ forms of the ops, by op."""
