"""Will run the production cores of router, kv_transfer and autoscaler in virtual time."""
