"""Area attention: what takes the place of softmax over all pairs, and what is built around it."""
