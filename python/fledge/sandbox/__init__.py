"""Where code that a model wrote is run: L0 arithmetic, L1 interpreter (Monty), L2 process."""
