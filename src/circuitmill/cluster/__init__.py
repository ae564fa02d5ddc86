"""A run on a cluster: its controller, its Slurm jobs, what they are at and how to end or resume them."""
