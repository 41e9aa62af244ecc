"""One file per protocol spoken to clients. Translation only; policy lives in the core."""
