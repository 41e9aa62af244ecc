"""The gateway and the brain: decides which request runs on which worker, and when."""
