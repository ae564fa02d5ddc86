"""Attribution graphs: trace a prompt, check the edges, prune, score, export, compare with known circuits."""
