"""Language models: loading, where their MLPs are, capturing and replacing them."""
