"""The interface between serving and learning: serving sends records, the learner sends adapters back."""
