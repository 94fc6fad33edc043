"""The towers on different ranks: who holds what, what crosses, and what a step does differently there."""
