"""What we can say about a model: quality, sparsity, cost, speed."""
