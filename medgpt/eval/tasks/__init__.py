"""The evaluation tasks, one module per kind."""
