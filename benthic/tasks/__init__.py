"""Tasks with exact answers: the same object teaches, rewards and evaluates."""
