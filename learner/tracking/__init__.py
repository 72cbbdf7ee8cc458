"""What people and MLflow learn of the learner's work."""
