"""Speed and memory against the same networks in torch: one script a task, `make bench` for all. See `common`."""
