"""The operations in Gluon, for Hopper cards."""
