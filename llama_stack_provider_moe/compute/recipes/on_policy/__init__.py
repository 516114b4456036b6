"""What recipes share that learn from answers which the trained model writes: GRPO and on-policy distillation."""
