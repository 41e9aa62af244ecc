"""Will hold the usage ledger, the audit log and the price book."""
