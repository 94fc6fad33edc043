"""What of a rejected draft goes into the next one."""

HINT_THRESHOLD = 0.95
"""Behind a rejected draft AR went on with a wrong token before it; what it chose there all the same, surer than this,
is a hint for the next draft. Without the limit hints do harm (benchmarks/results/self-speculation.md)."""
