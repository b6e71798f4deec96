"""Training: one loop for pretraining, fine-tuning and reinforcement learning."""
