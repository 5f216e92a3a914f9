"""Versions in MLflow's tracking and registry: a mirror that is brought up to date, and that nothing of ours reads."""
