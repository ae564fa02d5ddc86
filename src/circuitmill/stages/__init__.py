"""One module per stage: load through stores, call a domain package, store."""
