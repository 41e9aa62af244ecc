"""Will replay scenarios and traces against any target through its public API, and measure."""
