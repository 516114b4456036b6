"""The loop around TRL's trainers: steps, checkpoints, figures, evaluation."""
