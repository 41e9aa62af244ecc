"""Edges as processes of their own: several on one host share the public ports, and one core decides for all."""
