"""What is known of a model before and after training: reports, and their charts."""
