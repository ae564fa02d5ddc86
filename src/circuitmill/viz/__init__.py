"""Pages and figures of a finished run, and the server that shows them."""
