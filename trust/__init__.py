"""Who is who between processes, below everything that speaks: TLS from files that may change, and the proof by which a
worker and a router know each other. Imports nothing of the product, and everything of it may import this."""
