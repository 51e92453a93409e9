"""Train an unmodified Mixture-of-Experts model on many devices by rewriting its graph."""
