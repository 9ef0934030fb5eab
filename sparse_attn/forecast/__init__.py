"""Steps whose result is forecast from earlier ones instead of being computed."""
