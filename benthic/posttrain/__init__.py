"""Post-training: supervised fine-tuning and reinforcement learning on the trainer's one loop."""
