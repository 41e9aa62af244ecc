"""The worker process: one engine, the link to the router, drain and role change."""
