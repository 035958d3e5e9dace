"""What is to be done: nodes, proxies, the operation registry and shapes."""
