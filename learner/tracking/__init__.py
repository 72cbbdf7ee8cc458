"""Reports the learner's work to people and MLflow."""
