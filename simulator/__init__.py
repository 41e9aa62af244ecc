"""Runs the production cores in virtual time, around workers that take the time a model of hardware says they take."""
