"""What outlives the router: the journal of budgets and open requests, and the usage ledger."""
