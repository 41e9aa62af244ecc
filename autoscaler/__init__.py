"""Will turn load signals into a plan, and the plan into worker processes or replicas."""
